"""Which guest does what when: pure, without I/O."""
