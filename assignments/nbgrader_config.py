"""nbgrader's settings for the course's problem sets; see book/teaching.md."""

import os

from nbconvert.preprocessors import CSSHTMLHeaderPreprocessor
from nbgrader.preprocessors import (
    AssignLatePenalties,
    CheckCellMetadata,
    ClearHiddenTests,
    ClearOutput,
    GetGrades,
    IgnorePattern,
    LimitOutput,
    OverwriteCells,
    OverwriteKernelspec,
    SaveAutoGrades,
)

from bigmodel_course.classroom.grading import GradeApart, PutBack

c = get_config()  # noqa: F821, nbgrader gives it

c.CourseDirectory.course_id = "bigmodel"
# The folder through which sets are handed out and collected: it exists, and everybody in the class may write to it.
c.Exchange.root = os.environ.get("BIGMODEL_EXCHANGE", "/usr/local/share/nbgrader/exchange")
# A cell that was deleted, copied or split, or has lost its marks, costs at most its own problem.
c.Autograde.sanitize_preprocessors = [ClearOutput, PutBack, OverwriteKernelspec, OverwriteCells, CheckCellMetadata]
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
c.ClearSolutions.code_stub = {"python": "raise NotImplementedError  # your code"}
c.ClearSolutions.text_stub = "*Your answer, in your own words.*"
