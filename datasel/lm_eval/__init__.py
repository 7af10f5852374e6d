"""lm-evaluation-harness on this project's models: the model `datasel`, the papers' suites, tasks that need no hub."""
