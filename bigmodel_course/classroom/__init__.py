"""The classroom: problem sets that grade themselves, with the student's code in a process of its own."""
