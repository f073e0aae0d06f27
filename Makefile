.PHONY: check test train

check:            ## style and types
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

test:             ## the default test suite
	.venv/bin/pytest -n auto --maxprocesses 8

train:            ## the main job
	.venv/bin/klrl train ppo CartPole-v1
