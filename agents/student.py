"""A student: a policy that learns to act as its teachers do, which are saved agents' policies that move no more."""

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from gymnasium import spaces
from torch import Tensor, nn

from klrl.agents.actor import Actions
from klrl.agents.base import State, UpdateResult
from klrl.agents.limits import KLTarget
from klrl.agents.on_policy import Batch, OnPolicyAgent, OnPolicyConfig, value_loss
from klrl.agents.reference import FrozenPolicy
from klrl.buffers.rollout import RolloutBuffer
from klrl.config import Count, Named, Positive, PositiveInt, Reads
from klrl.errors import NonFiniteError, SkippedUpdateError, UsageError
from klrl.kl import distillation_loss, kl, select, state_mean
from klrl.policies.encoder import ObservationEncoder
from klrl.policies.heads import HEADS, CategoricalHead, JointCategoricalHead, NormalHead
from klrl.policies.networks import Array, OwnNetwork
from klrl.policies.observations import Observation
from klrl.policies.own import metavar, name_of
from klrl.policies.spaces import check_same_spaces, mask_sizes
from klrl.policies.squashed import SquashedHead
from klrl.policies.threads import on_torchs_threads

_OTHERS: dict[str, type[nn.Module]] = {"squashed": SquashedHead, "joint": JointCategoricalHead}
_FAMILIES = ("plain", *_OTHERS, *HEADS)


@dataclass(frozen=True)
class StudentConfig(OnPolicyConfig):
    teachers: tuple[str, ...] = ()
    """Runs or checkpoints to learn from; of several, by the mean of the KLs from each."""
    teacher_updates: Count = 10
    """Updates whose steps the teachers take, in turn; afterwards the student learns where it gets by itself."""
    temperature: Positive = 2.0
    """Divides the logits of teacher and student in the loss, where actions are discrete."""
    head: Annotated[str, Reads(name_of), Named(_FAMILIES), metavar(*_FAMILIES)] = "plain"
    """The teachers' family of policies: a normal or categoricals, a normal squashed by tanh, one categorical over all
    joint actions, a normal whose standard deviation depends on the state, a Beta, or a head of one's own."""
    observation_keys: tuple[str, ...] = ()
    """Parts of a Dict observation that the student sees; by default all."""
    batch_size: PositiveInt = 256
    """Rows of a minibatch; the last of a rollout has what is left."""
    n_epochs: PositiveInt = 10
    """Passes over a rollout in each update."""
    learning_rate: Positive = 3e-3
    """Adam's step size at the start."""
    lr_schedule: Literal["constant", "linear"] = "linear"
    """Keep it, or lower it linearly to 0 over the run."""
    max_grad_norm: Positive = 0.5
    """Longest gradient, of the policy and of the critic each; a longer one is scaled down."""
    kl: KLTarget = field(default_factory=lambda: KLTarget(target=0.0))


def family_of(head: Any) -> str:
    """The family of policies that a head makes, as ``StudentConfig.head`` names it."""
    plain = {"plain": type(head)} if type(head) in (NormalHead, CategoricalHead) else {}
    known = {**plain, **_OTHERS, **HEADS}
    return next((name for name, kind in known.items() if type(head) is kind), str(name_of(type(head))))


_TRACED = ("train/distillation_loss", "train/value_loss", "health/grad_norm")


class Student(OnPolicyAgent):
    """Policy distillation for Box, Discrete, MultiDiscrete and MultiBinary actions, from agents of the same spaces.

    At first on states that the teachers reach, then on its own, as in DAgger (Ross et al. 2011), but each rollout is
    learned from once and not kept. The critic learns the returns of whoever acts, for those who train the student
    further. With ``kl.target`` above 0 an update that moves the student further than that is moved back.
    """

    Config: ClassVar[type[OnPolicyConfig]] = StudentConfig

    def setup(self, init: torch.Generator, network: OwnNetwork | None) -> None:
        if self.config.memory != "none":
            raise UsageError("a student has no --memory")
        super().setup(init, network)
        self.limit.on_overshoot = "project"
        self.teachers: list[FrozenPolicy] = []

    def make_encoder(self) -> ObservationEncoder:
        config = self.config
        try:
            keys, sizes = config.observation_keys, mask_sizes(self.observation_space, self.action_space)
            return ObservationEncoder(self.observation_space, self.device, config.normalize_observation, keys, sizes)
        except UsageError as problem:
            raise UsageError(f"--observation-keys: {problem}" if config.observation_keys else str(problem)) from None

    def make_head(self) -> Any:
        name = self.config.head
        if name not in _OTHERS:
            return super().make_head()
        if isinstance(self.action_space, spaces.Box) != (name == "squashed"):
            raise UsageError(f"--head {name} makes no policy over the actions {self.action_space}")
        return _OTHERS[name](self.action_space)

    @property
    def stored_space(self) -> spaces.Space[Any]:
        joint: Any = self.policy.head
        return joint.space if self.config.head == "joint" else self.action_space  # actions of one number

    def prepare(self) -> None:
        """Read the teachers, and begin with the first's standard deviation where it is the same in all states.

        Raises UsageError where there are none, or one has other spaces or another family.
        """
        super().prepare()
        if not self.config.teachers:
            raise UsageError("a student learns from --teachers RUN...: klrl distill RUN names them")
        self.teachers = [self._teacher(run) for run in self.config.teachers]
        mine, theirs = (agent.policy.head for agent in (self, self.teachers[0].agent))
        if isinstance(mine, NormalHead) and isinstance(theirs, NormalHead):  # Adam's short steps would take long
            mine.log_std.data.copy_(theirs.log_std)

    def _teacher(self, run: str) -> FrozenPolicy:
        teacher = FrozenPolicy.read(run, self.device)
        check_same_spaces(self, teacher.agent, f"teacher {run}: its")
        probes = (agent.policy_at(agent.encoder.probe()) for agent in (teacher.agent, self))
        try:
            distillation_loss(*probes)
        except ValueError as problem:
            first = run == self.config.teachers[0]
            advice = f"--head {family_of(teacher.agent.policy.head)}" if first else "teach by runs of one family"
            raise UsageError(f"teacher {run}: {problem}; {advice}") from None
        return teacher

    def act(
        self, obs: Observation, deterministic: bool = False, rng: Any = None, state: Array | None = None
    ) -> Actions:
        """A teacher's actions, while those act, unless the student's own are asked for: the mode, or by ``rng``."""
        if deterministic or rng is not None or self.n_updates >= self.config.teacher_updates:
            return super().act(obs, deterministic, rng)
        if not self.teachers:
            self.prepare()
        return self.teachers[self.n_updates % len(self.teachers)].agent.act(obs, False, self.rng)

    def predict(
        self,
        observation: Observation,
        state: Any = None,
        episode_start: Any = None,
        deterministic: bool = False,
        action_masks: Any = None,
    ) -> tuple[Actions, Any]:
        """As every agent's: by the student's own policy, whoever takes the steps of training."""
        done, self.n_updates = self.n_updates, max(self.n_updates, self.config.teacher_updates)
        try:
            return super().predict(observation, state, episode_start, deterministic, action_masks)
        finally:
            self.n_updates = done

    @on_torchs_threads
    @torch.no_grad()
    def update(self, rollout: RolloutBuffer, progress: float = 0.0) -> UpdateResult:
        """Come nearer to the teachers on a full rollout, and report how far the student moved and is from them.

        Raises NonFiniteError naming the field where the rollout is not finite, and SkippedUpdateError where a loss, a
        gradient or a weight is not; policy, critic, optimizer and reward scale are then what they were before.
        """
        if not self.teachers:
            self.prepare()
        before, batch = self.snapshot(), self.make_batch(rollout)
        taught = [teacher.distribution(rollout.obs_before_steps()) for teacher in self.teachers]
        policy, params = partial(self.policy_at, batch.inputs), self.policy_params
        rate = self.config.learning_rate * (1 - progress if self.config.lr_schedule == "linear" else 1)
        try:
            # Without the actions, which may be a teacher's: what is estimated from them would be of no KL.
            with self.limit.update(policy, params.flat, batch.mask, optimizer=params.optimizer, old=batch.old) as move:
                figures = torch.stack(self._learn(batch, taught, rate)).double().mean(0).tolist()
                largest = max(float(part.flat.abs().max()) for part in (params, self.critic_params))
                if not math.isfinite(sum(figures) + largest):
                    found = dict(zip(_TRACED, figures, strict=True))
                    raise NonFiniteError(f"a loss or weight is not finite in update {self.n_updates + 1}: {found}")
        except (NonFiniteError, ValueError) as problem:  # ValueError: the policy has no KL, as its outputs overflow
            self.undo(before)
            raise SkippedUpdateError(str(problem)) from None
        metrics = dict(zip(_TRACED, figures, strict=True)) | {"train/learning_rate": rate}
        of_old, of_new = (self._distance(taught, policy, batch.mask) for policy in (batch.old, move.new))
        metrics |= {"distill/kl_before": of_old, "distill/kl": of_new}
        metrics |= self._likeness(taught, move.new, batch.mask)
        self.end_update(rollout)
        return UpdateResult(move.report, metrics | self.diagnostics(batch))

    def _learn(self, batch: Batch, taught: list[Any], learning_rate: float) -> list[Tensor]:
        """Take epochs of minibatch steps; the metrics of each."""
        config, rows = self.config, len(batch.weight)
        rate, trace = torch.tensor(learning_rate, device=self.device), []
        for _ in range(config.n_epochs):
            shuffled = torch.from_numpy(self.rng.permutation(rows)).to(self.device)
            for index in torch.split(shuffled, config.batch_size):
                minibatch = batch.take(index, rows / len(index))
                learn = partial(self._gradient, minibatch, [select(teacher, index) for teacher in taught])
                loss, loss_v, gradient = self.total(learn, 2, self.policy_params, self.critic_params)
                norm = self.take_step(gradient, rate, config.max_grad_norm, apart=True)
                trace.append(torch.stack([loss, loss_v, norm]))
        return trace

    def _gradient(self, minibatch: Batch, taught: list[Any]) -> tuple[Tensor, Tensor, Tensor]:
        """E[T^2 KL(teacher||student)], the teachers' mean, E[(V - return)^2], and the gradient of both."""
        with torch.enable_grad():
            student = self.policy(minibatch.inputs)
            losses = [distillation_loss(teacher, student, self.config.temperature) for teacher in taught]
            loss = minibatch.weight @ torch.stack(losses).mean(0)
            loss_v = value_loss(self.critic(minibatch.inputs), minibatch)
            gradient = self.gradient_of(loss + loss_v + self.critic.cost(minibatch))
        return loss.detach(), loss_v.detach(), gradient

    def _distance(self, taught: list[Any], policy: Any, mask: Tensor) -> float:
        """E[KL(teacher||policy)], the teachers' mean, in nats."""
        return float(state_mean(torch.stack([kl(teacher, policy) for teacher in taught]).mean(0), mask, self.ranks))

    def _likeness(self, taught: list[Any], policy: Any, mask: Tensor) -> dict[str, float]:
        """The share of states whose most likely action is a teacher's, or how far the means of continuous ones are
        from a teacher's, on average over actions; the teachers' mean."""
        theirs, mine = torch.stack([teacher.mode for teacher in taught]), policy.mode
        if mine.is_floating_point():
            name, found = "mean_difference", (theirs - mine).abs().mean(-1)
        else:
            name, found = "agreement", (theirs == mine).all(-1).float()
        return {f"distill/{name}": float(state_mean(found.mean(0), mask, self.ranks))}

    def state_dict(self) -> State:
        """With the teachers, so that a run goes on without the ones that it names."""
        return {**super().state_dict(), "teachers": {str(i): t.state_dict() for i, t in enumerate(self.teachers)}}

    def load_state_dict(self, state: State) -> None:
        super().load_state_dict(state)
        if self.config.teachers and not state["teachers"]:
            raise ValueError("it holds no teachers' policies")
        teachers = (state["teachers"][str(i)] for i in range(len(state["teachers"])))
        self.teachers = [FrozenPolicy.from_state(teacher, self.device) for teacher in teachers]
