"""The command at first sight: help, what completes, what a typing error gets, and the traceback behind it."""

import contextlib
import re
import subprocess
from pathlib import Path

import pytest
from helpers import QUICK

import klrl
from klrl.cli.main import main


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What a command prints, where it ends well."""
    with contextlib.suppress(SystemExit):  # of a command's --help
        main(words)
    out, err = capsys.readouterr()
    assert err == ""
    return out


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What a bad command line gets on stderr."""
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_without_arguments_and_with_help_every_command_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys)
    assert shown(capsys, "--help") == shown(capsys, "help") == text
    for command in (
        "train",
        "resume",
        "distill",
        "sweep",
        "eval",
        "report",
        "compare",
        "record",
        "export",
        "push",
        "list",
        "plot",
        "completion",
    ):
        assert re.search(f"^  klrl {command} ", text, re.MULTILINE)
    assert "--debug" in text
    assert shown(capsys, "--version") == f"klrl {klrl.__version__}\n"


@pytest.mark.parametrize("words", [[], ["ppo"], ["TRPO", "CartPole-v1"]])
def test_the_help_of_train_lists_the_agents(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "train", *words, "--help")
    assert "Agents: ppo, sac, trpo" in text
    assert "--n-steps" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train ppo CartPole-v1 --lr 3e-4", "unknown option '--lr' (did you mean '--learning-rate'?)"),
        ("train ppo CartPole-v1 --lr=3e-4", "unknown option '--lr=3e-4' (did you mean '--learning-rate'?)"),
        ("train ppo CartPole-v1 --num-envs 4", "(did you mean '--n-envs'?)"),
        ("train ppo CartPole-v1 --target-kl 4", "(did you mean '--kl.target'?)"),
        ("train trpo CartPole-v1 --fisher-share 1", "(did you mean '--fisher-fraction'?)"),
        ("train sac Pendulum-v1 --ent-rate 1", "(did you mean '--ent-coef-lr'?)"),
        ("train ppo CartPole-v1 --kl.stop -1", "--kl.stop must be at least 0, got -1"),
        ("train ppo cartpole-v1", "unknown env 'cartpole-v1' (did you mean 'CartPole-v1'?)"),
        ("train CartPole-v1 ppo", "the agent comes first, then the env: ppo CartPole-v1, not CartPole-v1 ppo"),
        ("sweep CartPole-v1 ppo", "the agent comes first, then the env: ppo CartPole-v1, not CartPole-v1 ppo"),
        ("train ppo CartPole-v1 --learning-rate 1e300", "--learning-rate must be above 0 and at most 1e+38"),
        ("train ppo CartPole-v1 --total-timesteps 1e30", "--total-timesteps must be at least 1 and at most 1e+15"),
        ("train ppo CartPole-v1 --n-envs 1e9", "--n-envs must be at least 1 and at most 65536"),
        ("train ppo CartPole-v1 --hidden-sizes 1e9 1e9", "--hidden-sizes must be at least 1 and at most 16384"),
        ("eval nothing --episodes 1e9", "--episodes must be at least 1 and at most 65536"),
        ("completion tcsh", "completion needs one of bash, zsh, got tcsh"),
        ("--tyro-print-completion bash", "(did you mean 'completion'?)"),
    ],
)
def test_what_is_mistyped_gets_one_line_that_says_what_would_do(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = refused(capsys, *words.split())
    assert message in text
    assert text.count("\n") == 1
    assert not Path("runs").exists()


def test_a_capitalised_agent_trains_sweeps_and_takes_its_own_config(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--total-timesteps", "200", "--n-envs", "3", "--n-steps", "64", "--quiet"]
    run = shown(capsys, "train", "PPO", "CartPole-v1", *words).splitlines()[1].split()[1]
    assert Path(run).name.startswith("ppo-CartPole-v1-0-")
    shown(capsys, "train", "Ppo", "CartPole-v1", "--config", f"{run}/config.toml")


def test_debug_shows_the_traceback_behind_the_line(capsys: pytest.CaptureFixture[str]) -> None:
    Path("f.toml").write_text("a = = 3")
    words = ["train", "ppo", "CartPole-v1", "--config", "f.toml"]
    assert "Traceback" not in refused(capsys, *words)
    text = refused(capsys, *words, "--debug")
    assert text.splitlines()[-1].startswith("klrl: --config f.toml is not valid TOML")
    assert "tomllib.TOMLDecodeError" in text, "the cause, which the line stands for"
    assert "UsageError" in text
    assert refused(capsys, "--debug", *words) == text


def test_the_shell_completes_commands_agents_environments_options_and_choices(
    capsys: pytest.CaptureFixture[str],
) -> None:
    script = shown(capsys, "completion", "bash")
    assert shown(capsys, "completion", "zsh").endswith(script)
    typed = {
        "": {
            "train",
            "resume",
            "distill",
            "sweep",
            "eval",
            "report",
            "compare",
            "record",
            "export",
            "push",
            "list",
            "plot",
            "completion",
        },
        "tr": {"train"},
        "train ": {"ppo", "sac", "trpo", "student"},
        "train ppo Cart": {"CartPole-v1"},
        "train ppo CartPole-v1 --kl.pen": {"--kl.penalty"},
        "train ppo CartPole-v1 --critic-k": {"--critic-kl"},
        "train trpo CartPole-v1 --kl.pen": set(),
        "train ppo CartPole-v1 --kl.penalty f": {"fixed"},
        "resume runs/x --qu": {"--quiet"},
        "distill runs/x --temp": {"--temperature"},
        "sweep ppo CartPole-v1 --see": {"--seeds"},
        "eval runs/x --checkpoint b": {"best"},
        "eval runs": set(),
        "export runs/x --format t": {"torch"},
        "push runs/x me/x --pri": {"--private"},
        "plot kl-2": {"kl-2d"},
    }
    for words in typed:
        parts = " ".join(f"'{word}'" for word in ["klrl", *words.split(" ")])
        count = len(words.split(" "))
        script += f'COMP_WORDS=({parts}); COMP_CWORD={count}; _klrl; echo "${{COMPREPLY[*]}}"\n'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    found = [set(line.split()) for line in done.stdout.splitlines()]
    assert dict(zip(typed, found, strict=True)) == typed


def test_a_misspelled_keyword_from_python_is_named_with_the_one_that_is_meant() -> None:
    with pytest.raises(klrl.UsageError, match=r"unknown option 'n_step' \(did you mean 'n_steps'\?\)"):
        klrl.train("ppo", "CartPole-v1", **QUICK | {"n_step": 1})
