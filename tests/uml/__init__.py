"""Programs that run in a guest of User-mode Linux, each for one file of tests in `tests.e2e`."""
