"""One cluster's life, for test_deployment_cluster.py: what happened goes to a journal, line by line.

    python cluster_story.py JOURNAL FOLDER

At the end it waits, its cluster running, to be killed.
"""

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import count
from pathlib import Path

import numpy as np
import onnxruntime
import psutil
import torch

from bigmodel_course.deployment.cluster import Cluster, Replica, cut, deployment
from bigmodel_course.models import GPT, GPTConfig

ROOT = Path(__file__).parent.parent
CLIENTS = 8
ENOUGH = 60  # answers of a load


def model() -> GPT:
    """Small, with scores that are far from each other."""
    gpt = GPT(GPTConfig(layers=3, heads=2, width=32, context=48), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for p in gpt.parameters():
            p *= 3
    return gpt.eval()


def prompts() -> list[str]:
    draw = torch.Generator().manual_seed(1)
    lengths = [1, 2, 47, 48, 100, *torch.randint(1, 48, (5,), generator=draw).tolist()]
    return ["".join(chr(c) for c in torch.randint(32, 127, (n,), generator=draw)) for n in lengths]


class Story:
    def __init__(self, journal: Path, folder: Path, cluster: Cluster):
        self.journal, self.folder, self.cluster, self.gpt = journal, folder, cluster, model()
        self.right = {prompt: self.scores(prompt) for prompt in prompts()}

    def scores(self, prompt: str) -> torch.Tensor:
        tokens = torch.tensor([list(prompt.encode())[-self.gpt.config.context :]])
        with torch.no_grad():
            return self.gpt(tokens)[0, -1]

    def tell(self, what: str, **found) -> None:
        with self.journal.open("a") as file:
            file.write(json.dumps({"what": what, **found}) + "\n")

    def parts(self, prompt: str) -> np.ndarray:
        """The same parts, one after the other in this process."""
        x = np.array([list(prompt.encode())[-self.gpt.config.context :]])
        for i in range(2):
            session = onnxruntime.InferenceSession(self.folder / f"stage_{i}.onnx", providers=["CPUExecutionProvider"])
            x = session.run(None, {session.get_inputs()[0].name: x})[0]
        return x[0, -1]

    def answers(self) -> None:
        found = {prompt: torch.tensor(self.cluster.predict(prompt)["scores"]) for prompt in prompts()}
        whole = max(((found[p] - right).abs().max() / right.abs().max()).item() for p, right in self.right.items())
        parts = max(np.abs(found[p].numpy() - self.parts(p)).max().item() for p in found)
        top = {int(right.argmax()) for right in self.right.values()}
        self.tell("answers", whole=whole, parts=parts, different=len(top))

    def sockets(self) -> None:
        listening, nice = [], []
        for process in self.cluster.processes():
            with suppress(psutil.NoSuchProcess):  # Ray ends workers that are idle
                ears = [c.laddr.ip for c in process.net_connections("inet") if c.status == "LISTEN"]
                listening += [(process.name(), ip.removeprefix("::ffff:")) for ip in ears]
                nice.append(process.nice())
        self.tell("sockets", listening=listening, nice=nice)

    def bad_requests(self) -> None:
        bodies = [b"", b"{", b"[]", b'{"prompt": 3}', b'{"prompt": ""}', b'{"prompt": "a", "tries": 99}', b"[" * 60_000]
        bodies.append(json.dumps({"prompt": "a" * 70_000}).encode())
        answers = [self.cluster.http.post("/predict", content=body) for body in bodies]
        self.tell("bad requests", statuses=[a.status_code for a in answers], said=[a.json()["error"] for a in answers])

    def load(self, act, **extra) -> dict:
        """Ask from CLIENTS threads before, while and after `act()` runs; count what came back."""
        going, seen, said, asked = [True], [], [], count()

        def client(i: int) -> None:
            time.sleep(i / CLIENTS / 2)  # or all would be at the same stage at the same time
            while going:
                prompt = list(self.right)[next(asked) % len(self.right)]
                start = time.monotonic()
                answer = self.cluster.http.post("/predict", json={"prompt": prompt, **extra})
                seconds, found = time.monotonic() - start, answer.json() if answer.status_code == 200 else {}
                wrong = bool(found) and (torch.tensor(found["scores"]) - self.right[prompt]).abs().max().item() > 1e-5
                if answer.status_code != 200:
                    said.append(answer.json()["error"])
                seen.append((answer.status_code, wrong, found.get("retries", 0), seconds, found.get("replicas", [])))

        def heard() -> bool:
            """Has every replica that runs answered, or a client failed?"""
            known = {name for answer in list(seen) for name in answer[-1]}
            running = {r.name for i in range(2) for r in self.cluster.replicas("split", f"Stage{i}")}
            return running <= known or any(each.done() for each in clients)

        with ThreadPoolExecutor(CLIENTS) as pool:
            clients = [pool.submit(client, i) for i in range(CLIENTS)]
            try:
                self.cluster.wait(heard, "an answer of every replica")
                act()
                self.cluster.wait(heard, "an answer of every new replica")
                self.cluster.wait(lambda: len(seen) > ENOUGH or any(c.done() for c in clients), "enough answers")
            finally:
                going.clear()
            [each.result() for each in clients]
        status, wrong, retries, seconds, replicas = zip(*seen, strict=True)
        failed = sum(s != 200 for s in status)
        names = sorted({name for each in replicas for name in each})
        sums = {
            "wrong": sum(wrong),
            "retries": sum(retries),
            "slowest": max(seconds),
            "replicas": names,
            "said": " ".join(said),
        }
        return {"requests": len(seen), "failed": failed, "statuses": sorted(set(status)), **sums}

    def whole(self) -> bool:
        return all(len(self.cluster.replicas("split", f"Stage{i}")) == 2 for i in range(2))

    def new(self, victim: Replica) -> bool:
        """Whether another replica stands in the victim's place."""
        return self.whole() and victim not in self.cluster.replicas("split", victim.name.split("#")[0])

    def kill_replicas(self) -> None:
        def act(*stages: str) -> None:
            for stage in stages:
                victim = self.cluster.replicas("split", stage)[0]
                self.cluster.kill(victim)
                self.cluster.wait(lambda victim=victim: self.new(victim), "a new replica")

        self.tell("replicas killed, one try", **self.hit("failed", lambda: act("Stage1"), tries=1))
        self.tell("replicas killed", **self.hit("retries", lambda: act("Stage0", "Stage1")))

    def hit(self, sign: str, act, **extra) -> dict:
        """`load`, a few times at most until the blow fell on a request that was under way, which the sign says."""
        for _ in range(4):
            told = self.load(act, **extra)
            if told[sign] or (told["failed"], told["wrong"]) != (0, 0):
                break
        return told

    def worker(self) -> str:
        return next(node["node"] for node in self.cluster.nodes() if not node["head"])

    def kill_node(self) -> None:
        def act():
            self.cluster.kill_node(self.worker())
            noticed = self.cluster.wait(lambda: len(self.cluster.nodes()) == 2, "the node to be missed")
            self.cluster.add_node()
            self.tell("node", noticed=noticed, whole=self.cluster.wait(self.whole, "the new node to be used"))

        self.tell("node killed", **self.hit("retries", act))

    def sleepers(self) -> int:
        return len(self.cluster.replicas("sleep", "Sleep"))

    def autoscale(self) -> None:
        going, slept, seen = [True], [], {self.sleepers()}

        def client(_: int) -> None:
            while going:
                slept.append(self.cluster.http.get("/sleep").json()["replica"])

        with ThreadPoolExecutor(6) as pool:
            clients = [pool.submit(client, i) for i in range(6)]
            try:
                self.cluster.wait(lambda: seen.add(self.sleepers()) or self.sleepers() == 3, "three replicas")
                for _ in range(20):  # until the new ones are known and the machine lets them
                    before, start = len(slept), time.monotonic()
                    time.sleep(3)
                    answers, seconds = len(slept) - before, time.monotonic() - start
                    if answers > 1.3 * seconds / 0.2:  # more than one replica can
                        break
            finally:
                going.clear()
            [each.result() for each in clients]
        down = self.cluster.wait(lambda: self.sleepers() == 1, "one replica again")
        self.tell("autoscaled", seen=sorted(seen), answers=answers, seconds=seconds, down=down)

    def scale(self) -> None:
        """One deployment of the file changed: the others keep their processes."""
        pids = {r.pid for r in self.cluster.replicas("split", "Stage0")}
        config = self.cluster.config
        deployment(config, "split", "Stage1")["num_replicas"] = 1
        self.cluster.deploy(config)
        self.cluster.wait(lambda: len(self.cluster.replicas("split", "Stage1")) == 1, "one replica fewer")
        kept = pids == {r.pid for r in self.cluster.replicas("split", "Stage0")}
        self.tell("scaled", kept=kept, answers=len(self.cluster.predict("a")["scores"]))


def main() -> None:
    journal, folder = map(Path, sys.argv[1:])
    cut(model(), folder, stages=2, name="story")
    start = time.monotonic()
    with Cluster(ROOT / "clusters" / "serve.yaml", model=folder, timeout=600.0) as cluster:
        story = Story(journal, folder, cluster)
        story.tell("started", seconds=time.monotonic() - start)
        for chapter in (
            story.answers,
            story.sockets,
            story.bad_requests,
            story.autoscale,
            story.kill_replicas,
            story.kill_node,
            story.scale,
        ):
            chapter()
        family = [process.pid for process in cluster.processes()]
        story.tell("end", family=family, folder=str(cluster.process.folder), port=cluster.http.base_url.port)
        time.sleep(3600)


if __name__ == "__main__":
    main()
