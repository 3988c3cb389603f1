# Two commands: `make lab` to read and run the course, `make test` to check all of it.  `make help` lists the rest.

PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11 python,$(shell $(p) -c 'import sys; (3, 11) <= sys.version_info[:2] <= (3, 13) and print("$(p)")' 2>/dev/null)))
BIN := .venv/bin
PORT ?= 8888
ARGS ?=
SEED ?= 1
LESSON ?= notebooks/00_start_here.ipynb
N ?= 2
LESSONS ?= $(sort $(wildcard notebooks/*.ipynb))

# Threads that wait for work must not burn the core that has it: steps on small models get up to 40 times slower.
export OMP_WAIT_POLICY ?= PASSIVE

# One torch thread a process and no progress bars: what is compared must not depend on either.
QUIET := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 TQDM_DISABLE=1

.PHONY: mnist-if-reachable help lab test style unit nbval lessons verification bench browser mnist lock clean setup serve-cluster release class-demo class-browser exam progress
.DEFAULT_GOAL := help

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-13s %s\n", $$1, $$2}'

setup: ## make .venv from the lock file, if it is missing or the lock changed
	@if [ -z "$(PYTHON)" ] || ! command -v "$(PYTHON)" >/dev/null; then \
	  echo "The course needs Python 3.11, 3.12 or 3.13 and none was found: install one, or name it with make PYTHON=/path/to/python." >&2; exit 1; fi
	@"$(PYTHON)" tools/environment.py

serve-cluster: setup ## make .venv-cluster, Ray's own environment: lesson 55 and its tests need it
	@"$(PYTHON)" tools/environment.py cluster

lab: setup ## open the course in JupyterLab (PORT=8888, ARGS="--no-browser")
	@$(BIN)/jupyter lab --ServerApp.ip=127.0.0.1 --ServerApp.port=$(PORT) --LabApp.news_url=None \
	  --LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate $(ARGS) $(LESSON)

test: setup serve-cluster $(if $(CI),mnist-if-reachable) style unit nbval ## check everything: format, lint, tests, every lesson compared cell by cell

mnist-if-reachable: setup # CI measures the stored compressed model on MNIST too; without a network that test says it was skipped
	@$(BIN)/python -m tools.fetch_mnist || true

style: setup ## format and lint, notebooks included
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .

unit: setup serve-cluster ## the package's tests, and those of the lessons' form
	@$(QUIET) $(BIN)/python -m pytest -q -n $(N) --dist worksteal

nbval: setup serve-cluster ## every lesson, run again and compared in strict mode
	@$(QUIET) $(BIN)/python -m pytest -q -n $(N) --dist loadfile -p tools.patient_nbval -p tools.strict_nbval --nbval --nbval-cell-timeout=300 $(LESSONS)

lessons: setup serve-cluster ## run the lessons from a clean kernel and store their outputs (LESSONS=notebooks/11*, N=2 at a time)
	@$(BIN)/python tools/store_lessons.py --jobs $(N) $(LESSONS)

verification: setup serve-cluster ## run the package's tests and store the table that they measure, which lessons and book show
	@$(QUIET) $(BIN)/python -m pytest -q -n $(N) --dist worksteal --ignore=tests/test_lessons.py --ignore=tests/test_verification.py
	@$(BIN)/python -m tools.store_verification

bench: setup ## side-by-side ratios (ARGS="optim --quick --json")
	@$(BIN)/python -m benchmarks $(ARGS)

browser: setup ## drive a lesson in real JupyterLab with headless Chromium; pictures go to build/browser
	@$(BIN)/python tools/drive_lab.py $(ARGS)

mnist: setup ## fetch MNIST into data/mnist and check its hashes (for the compression part)
	@$(BIN)/python -m tools.fetch_mnist

lock: setup ## resolve both lock files again, from pyproject.toml and clusters/requirements.in (needs uv)
	@uv pip compile pyproject.toml --universal --all-extras --python-version 3.11 --no-emit-index-url --no-header --no-annotate --upgrade -o requirements.lock
	@uv pip compile clusters/requirements.in -c requirements.lock --universal --python-version 3.11 --no-emit-index-url --no-header --no-annotate --upgrade -o requirements-cluster.lock

release: setup ## make the students' copies of the problem sets, and the book's page of wrong answers, from assignments/source
	@$(BIN)/python -m tools.release_sets

class-demo: setup ## a teacher's whole path with seven made-up students, under build/class (ARGS="--set 2_compress")
	@$(BIN)/python -m tools.class_demo $(ARGS)

class-browser: setup ## the students' side in a real browser, after class-demo: assignment list and Validate
	@$(BIN)/python -m tools.drive_class

exam: setup ## the problem sets with other numbers (SEED=7), under build/exam-7
	@$(BIN)/python -m tools.exam $(SEED)

progress: setup ## which exercises are right, wrong or open in the lessons as they are saved
	@$(BIN)/python -m bigmodel_course.classroom.progress notebooks

clean: ## remove what was made: the environments, build, caches
	@rm -rf .venv .venv-cluster build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf
