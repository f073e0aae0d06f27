"""A policy as one file that runs without klrl: from raw observations to the environment's actions."""

import copy
import io
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector.utils import batch_space
from torch.utils._pytree import tree_map

from klrl import __version__
from klrl.agents.base import Agent
from klrl.config import Checked, build
from klrl.envs.make import Imports
from klrl.errors import EnvironmentFailedError, UsageError, needs, one_line, refusals
from klrl.policies.deployed import DeployedPolicy, Feed
from klrl.policies.networks import Array
from klrl.policies.observations import Observation
from klrl.policies.spaces import to_json
from klrl.rundir.folder import new_file
from klrl.training.load import LoadedPolicy, load_policy

_STATES, _ROWS = 1000, 100  # that a file is checked on, and how many of them at once
_TOLERANCE = 1e-5
_SUFFIX = {"onnx": "onnx", "torch": "pt2"}


@dataclass(frozen=True)
class ExportConfig(Checked):
    format: Literal["onnx", "torch"] = "onnx"
    """An ONNX file (takes the extra "onnx"), or one of torch.export, which torch.export.load reads."""
    output: str = ""
    """File to write; by default policy.onnx or policy.pt2, here."""
    noise: bool = False
    """Take noise as a further input, which draws the actions; otherwise they are the most likely ones."""
    checkpoint: Literal["last", "best"] = "last"
    """Which of a run's checkpoints."""
    imports: Imports = ()


class Exported(NamedTuple):
    """A file that was written, and how it was checked."""

    path: Path
    check: str
    """On which states, and the largest difference from the agent's own actions."""


def export(policy: str | Path | Agent, output: str | Path = "", /, **options: Any) -> Exported:
    """Write the policy of a run, a checkpoint or an agent to a file that runs without klrl: from observations as the
    environment shows them, [B, *shape], to actions as it takes them, with normaliser, scaling and clipping inside.

    ``options``: the command line's, as keywords. Raises UsageError where the policy cannot be exported, and where the
    file does not act as the agent does, to 1e-5 on 1,000 states; nothing is written then.
    """
    config = build(ExportConfig, {"output": output, **options})
    if not isinstance(policy, str | Path | Agent):
        raise UsageError(f"export takes a run, a checkpoint or an agent, not {policy!r}")
    path = Path(config.output or f"policy.{_SUFFIX[config.format]}")
    if path.is_dir() or not path.parent.is_dir():
        raise UsageError(f"--output {path}: {'a folder' if path.is_dir() else f'there is no folder {path.parent}'}")
    if config.format == "onnx":
        for module in ("onnx", "onnxscript", "onnxruntime"):
            with needs("onnx", module):
                import_module(module)
    trained = None if isinstance(policy, Agent) else load_policy(policy, config.checkpoint, config.imports)
    agent: Any = policy if trained is None else trained.agent
    deployed = DeployedPolicy(agent.policy, config.noise)
    obs, of = _states(agent, trained)
    feed = deployed.feed(obs, np.random.default_rng(0))
    write, run = (_onnx if config.format == "onnx" else _torch)(deployed, feed)
    largest = _check(agent, obs, feed, run)
    check = f"{_STATES:,} states {of}, largest difference {largest:.2g}"
    data = write({**_about(agent, trained, deployed, feed), "check": check})
    unfinished = path.with_name(f".writing-{path.name}")
    with refusals(f"--output {path}"):
        with open(new_file(unfinished), "wb") as file:
            file.write(data)
        os.replace(unfinished, path)
    return Exported(path, check)


Writer = Callable[[dict[str, Any]], bytes]
Runner = Callable[[Feed], Sequence[Array]]
"""From a feed to actions and, with a memory, the states after them."""


def _torch(deployed: DeployedPolicy, feed: Feed) -> tuple[Writer, Runner]:
    """What makes a file of torch.export from what it says of itself, and what runs one."""
    program = _program(deployed, feed)

    def write(about: dict[str, Any]) -> bytes:
        data = io.BytesIO()
        torch.export.save(program, data, extra_files={"klrl.json": json.dumps(about, indent=1)})
        return data.getvalue()

    loaded = torch.export.load(io.BytesIO(write({}))).module()

    def run(part: Feed) -> Sequence[Array]:
        found = loaded(*deployed.arguments(part))
        return [one.numpy() for one in (found if isinstance(found, tuple) else (found,))]

    return write, run


def _onnx(deployed: DeployedPolicy, feed: Feed) -> tuple[Writer, Runner]:
    """The same of ONNX."""
    import onnx
    import onnxruntime

    program, shapes = _program(deployed, feed), _any_number_of_rows(deployed.arguments(feed))
    outputs = ["action", "next_state"] if deployed.state_size else ["action"]
    names: dict[str, Any] = {"input_names": list(feed), "output_names": outputs, "dynamic_shapes": shapes}
    with _refusing("the network has no form in ONNX"), _quiet():
        made = torch.onnx.export(program, dynamo=True, external_data=False, verbose=False, **names)
    assert made is not None
    proto, options = made.model_proto, onnxruntime.SessionOptions()

    def write(about: dict[str, Any]) -> bytes:
        onnx.helper.set_model_props(proto, {k: v if isinstance(v, str) else json.dumps(v) for k, v in about.items()})
        return proto.SerializeToString()

    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(write({}), options, ["CPUExecutionProvider"])
    return write, lambda part: session.run(outputs, part)


def _program(deployed: DeployedPolicy, feed: Feed) -> Any:
    """The exported program, for any number of rows. Raises UsageError where a network does what torch.export cannot."""
    arguments = deployed.arguments({name: part[:2] for name, part in feed.items()})
    shapes = _any_number_of_rows(arguments)
    with _refusing(f"a {type(deployed.network).__name__} cannot be exported"), _quiet(), torch.no_grad():
        program = torch.export.export(deployed, arguments, dynamic_shapes=shapes)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # this machine's paths
    return program


def _any_number_of_rows(arguments: tuple[Any, ...]) -> Any:
    """The form in which torch's exporters are told so, for each of the arguments."""
    rows = {0: torch.export.Dim("batch", min=1)}
    return tree_map(lambda part: None if part is None else rows, arguments)


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    """Raise UsageError, which begins with ``what``, where torch's exporters fail, whose reasons fill pages."""
    try:
        yield
    except Exception as problem:
        raise UsageError(f"{what}: {one_line(problem)[:300]}") from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch's exporters warn of: their own parts, and packages that they could use."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(before)


def _states(agent: Agent, trained: LoadedPolicy | None) -> tuple[Observation, str]:
    """A thousand observations as ``Layout.batch`` gives them, and where they are from: the environment that the policy
    was trained on, where that can be made, otherwise the observation space."""
    layout = agent.encoder.layout
    if trained is not None and trained.env:
        config = replace(trained.config, env=replace(trained.config.env, vectorization="sync"))
        with suppress(UsageError, EnvironmentFailedError):
            rng, seen = np.random.default_rng(0), list[Observation]()
            with closing(replace(trained, config=config).make_envs(8)) as envs:
                obs, _ = envs.reset(seed=0)
                while len(seen) * envs.num_envs < _STATES:
                    seen.append(copy.deepcopy(layout.batch(obs)))
                    obs = envs.step(agent.env_action(agent.act(obs, rng=rng)))[0]
            return tree_map(lambda *parts: np.concatenate(parts)[:_STATES], *seen), f"of {trained.env}"
    space = batch_space(agent.observation_space, _STATES)
    space.seed(0)
    # Within 100 of 0: bounds may be those of their type, where networks overflow.
    moderate = tree_map(lambda x: x.clip(-100, 100) if x.dtype.kind == "f" else x, layout.batch(space.sample()))
    return moderate, "of the observation space"


class _Given:
    """Noise that is drawn already, for a head's own sampling."""

    def __init__(self, noise: Array) -> None:
        self.noise = noise

    def standard_normal(self, shape: Any, dtype: Any = None) -> Array:
        return self.noise.copy()

    def standard_exponential(self, shape: Any) -> Array:
        return np.exp(-self.noise.astype(np.float64))


def _check(agent: Agent, obs: Observation, feed: Feed, run: Runner) -> float:
    """The largest ``_difference`` between the file's actions and the agent's. Raises UsageError above 1e-5."""
    largest = 0.0
    # The first by itself, as a robot shows one at a time.
    for rows in (slice(1), *(slice(i, i + _ROWS) for i in range(1, _STATES, _ROWS))):
        part, given = ({k: v[rows] for k, v in feed.items()}, _rows(obs, rows))
        difference = _difference(agent, given, run(part), part.get("noise"), part.get("state"))
        if not difference <= _TOLERANCE:
            raise UsageError(f"the file's actions differ from klrl's by {difference:.2g}: nothing was written")
        largest = max(largest, difference)
    return largest


def _rows(obs: Any, rows: slice) -> Any:
    return tree_map(lambda part: part[rows], obs)


def _difference(
    agent: Agent, obs: Observation, given: Sequence[Array], noise: Array | None = None, state: Array | None = None
) -> float:
    """How far actions are from the agent's own, at most, or states after them; of actions above 1, in terms of the
    largest.

    Of discrete ones that differ, how far apart the two best logits are.
    """
    found, moved = given[0], None if state is None else state.copy()
    more: dict[str, Any] = {} if moved is None else {"state": moved}
    wanted = agent.env_action(agent.act(obs, noise is None, None if noise is None else _Given(noise), **more))
    of_state = 0.0 if moved is None else float(np.abs(given[1] - moved).max())
    if (found.shape, found.dtype) != (wanted.shape, wanted.dtype):
        raise UsageError(f"the file gives {found.dtype} {found.shape}, and klrl {wanted.dtype} {wanted.shape}")
    if isinstance(agent.action_space, spaces.Box):
        apart = np.abs(found.astype(np.float64) - wanted)
        return max(of_state, float(apart.max() / max(1.0, float(np.abs(wanted).max()))))
    differs = (found != wanted).reshape(len(wanted), -1)
    outputs = agent.policy.outputs(obs, None if state is None else state.copy())
    logits = agent.policy.head(torch.from_numpy(outputs).to(agent.device)).logits.detach().cpu().numpy()
    best = np.sort(logits + (0 if noise is None else noise), -1)
    gaps = best[..., -1] - best[..., -2]
    # A joint action has several parts, but one gap.
    return max(of_state, float(gaps[differs if differs.shape == gaps.shape else differs.any(1)].max(initial=0.0)))


def _about(agent: Agent, trained: LoadedPolicy | None, deployed: DeployedPolicy, feed: Feed) -> dict[str, Any]:
    """What a file says of itself."""
    inputs = {n: {"shape": ["batch", *part.shape[1:]], "dtype": str(part.dtype)} for n, part in feed.items()}
    for name, about in inputs.items():
        what = {"noise": deployed.noise, "state": "next_state of the step before; zeros where an episode begins"}
        about["is"] = what.get(name, "as the environment shows it")
    return {
        "agent": agent.name(),
        "env_id": trained.env if trained else "",
        "step": str(trained.step if trained else 0),
        "observation_space": to_json(agent.observation_space),
        "action_space": to_json(agent.action_space),
        "inputs": inputs,
        "outputs": {
            "action": "as the environment takes it, [batch, ...]",
            **({"next_state": "what the policy remembers, [batch, S]"} if deployed.state_size else {}),
        },
        "klrl": __version__,
        "torch": str(torch.__version__),
    }
