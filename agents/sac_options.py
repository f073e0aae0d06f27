"""The options of SAC."""

from dataclasses import dataclass, field
from typing import Annotated

from klrl.agents.limits import OffPolicyKLConfig
from klrl.agents.reference import ReferenceConfig
from klrl.config import Checked, Fraction, NonNegative, Positive, PositiveInt, Range, Widths
from klrl.policies.networks import Activation


@dataclass(frozen=True)
class SACConfig(Checked):
    buffer_size: PositiveInt = 1_000_000
    """Transitions kept for replay."""
    buffer_folder: str = ""
    """A folder for a replay buffer that is larger than memory: mapped from a file there."""
    learning_starts: PositiveInt = 1000
    """Steps with random actions, of all processes together, before the first update."""
    train_freq: PositiveInt = 1
    """Steps of each environment between two updates."""
    gradient_steps: Annotated[int, Range(-1)] = -1
    """Gradient steps of an update, at most kl.every; -1 takes as many as environment steps were made, by each process
    where several train."""
    batch_size: Annotated[int, Range(1, 1_000_000)] = 256
    """Transitions of a gradient step."""
    n_step: PositiveInt = 1
    """Rewards summed before a value is bootstrapped."""
    learning_rate: Positive = 3e-4
    """Adam's step size, for the policy and the critics."""
    critic_learning_rate: NonNegative = 0.0
    """Adam's step size for the critics; 0 takes learning_rate."""
    gamma: Fraction = 0.99
    """Discount factor."""
    tau: Fraction = 0.005
    """How far the target critics follow the critics at each gradient step."""
    ent_coef: Annotated[float, Range(1e-6, 1e6)] = 1.0
    """The temperature alpha at the start; it then holds the entropy at its target."""
    ent_coef_lr: Positive = 3e-3
    """Step of log alpha per gradient step, for each nat that the entropy is off its target, per action dimension."""
    target_entropy: Annotated[float, Range(high=0.69)] = -1.0
    """Continuous actions: the least entropy for each dimension, in nats; uniform on -1 to 1 has 0.69."""
    target_entropy_fraction: Annotated[float, Range(0, 0.99)] = 0.3
    """Discrete actions: the least entropy as a fraction of the largest, log n."""
    noise_correlation: Annotated[float, Range(0, 0.999)] = 0.0
    """Continuous actions: correlation of an environment's noise from step to step, where white noise averages out."""
    hidden_sizes: Widths = (256, 256)
    """Widths of the hidden layers, of the policy and of the critics."""
    critic_hidden_sizes: Widths = ()
    """Widths of the critics' hidden layers; by default as hidden_sizes."""
    activation: Activation = "relu"
    """Activation of the policy's hidden layers."""
    critic_activation: Activation = "relu"
    """Activation of the critics' hidden layers."""
    layer_norm: bool = False
    """Normalise each hidden layer's numbers before their activation, in the policy and in the critics."""
    kl: OffPolicyKLConfig = field(default_factory=OffPolicyKLConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
