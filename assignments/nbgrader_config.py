"""nbgrader's settings for the course's problem sets; see book/teaching.md."""

import os

from nbconvert.preprocessors import CSSHTMLHeaderPreprocessor
from nbgrader.preprocessors import (
    AssignLatePenalties,
    CheckCellMetadata,
    ClearHiddenTests,
    GetGrades,
    IgnorePattern,
    LimitOutput,
    SaveAutoGrades,
)

from bigmodel_course.classroom.grading import GradeApart

c = get_config()  # noqa: F821, nbgrader gives it

c.CourseDirectory.course_id = "bigmodel"
# The folder through which sets are handed out and collected: it exists, and everybody in the class may write to it.
c.Exchange.root = os.environ.get("BIGMODEL_EXCHANGE", "/usr/local/share/nbgrader/exchange")
# A student's code and the tests never share a process: a loop that never ends costs one problem, and no answer can
# read a hidden test or change a check.
c.Autograde.autograde_preprocessors = [
    GradeApart,
    IgnorePattern,
    LimitOutput,
    SaveAutoGrades,
    AssignLatePenalties,
    CheckCellMetadata,
]
c.GenerateFeedback.preprocessors = [GetGrades, ClearHiddenTests, CSSHTMLHeaderPreprocessor]  # a set can be used again
c.OverwriteCells.add_missing_cells = True  # a test cell that was deleted is put back, and scores what it scores
c.ClearSolutions.code_stub = {"python": "raise NotImplementedError  # your code"}
c.ClearSolutions.text_stub = "*Your answer, in your own words.*"
