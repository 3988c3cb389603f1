"""What the Makefile calls: the environment, the lessons' storing and comparing, the browser, the data."""
