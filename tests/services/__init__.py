"""Real servers that the tests of targets talk to."""
