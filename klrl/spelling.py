"""What an unknown name may have meant: a word of other libraries, or a slip of the pen."""

import difflib
from collections.abc import Iterable

# What is called otherwise elsewhere (Stable-Baselines3, CleanRL, RLlib, klrl 0.1.0), by the name it has here.
_ELSEWHERE = {
    "total_timesteps": "timesteps n_timesteps num_timesteps total_steps num_steps_total max_steps steps",
    "n_envs": "num_envs num_env envs n_workers num_workers",
    "device": "cuda gpu",
    "threads": "n_threads num_threads torch_threads",
    "run_dir": "output out log_dir logdir tensorboard_log save_path",
    "eval_every": "eval_freq evaluation_interval",
    "eval_episodes": "n_eval_episodes num_eval_episodes",
    "stop_at_return": "reward_threshold stop_reward target_return solved_at",
    "log": "track report_to logger loggers",
    "save_every": "save_freq save_interval checkpoint_every checkpoint_freq",
    "env.kwargs": "env_kwargs env_args env_config",
    "n_steps": "num_steps rollout_length rollout_steps horizon",
    "learning_rate": "lr alpha_lr policy_lr pi_lr vf_lr step_size",
    "critic_learning_rate": "critic_lr q_lr qf_lr",
    "lr_schedule": "anneal_lr schedule",
    "gamma": "discount discount_factor",
    "gae_lambda": "lam lambda gae lambda_ gae_lam",
    "batch_size": "bs minibatch_size mini_batch_size sgd_minibatch_size",
    "n_epochs": "epochs num_epochs update_epochs num_sgd_iter train_iters",
    "clip_range": "clip clip_coef clip_eps clip_epsilon clip_param eps_clip clip_ratio",
    "clip_range_vf": "clip_vloss vf_clip_param clip_value",
    "ent_coef": "ent entropy entropy_coef entropy_coeff entropy_bonus alpha temperature",
    "vf_coef": "vf value_coef value_coeff vf_loss_coeff",
    "max_grad_norm": "grad_clip grad_norm clip_grad gradient_clip",
    "normalize_advantage": "norm_adv normalize_advantages",
    "normalize_observation": "norm_obs normalize_obs",
    "normalize_reward": "norm_reward normalize_rewards",
    "share_network": "share_features_extractor vf_share_layers",
    "hidden_sizes": "net_arch hidden layers hidden_size hidden_layers policy_kwargs",
    "kl.target": "target_kl max_kl desired_kl kl_target delta",
    "kl.coef": "kl_coef kl_coeff beta",
    "fisher_fraction": "fisher_share sub_sampling_factor",
    "cg_max_steps": "cg_iters cg_iterations",
    "cg_damping": "damping",
    "line_search_max_iter": "backtrack_iters",
    "n_critic_updates": "train_v_iters vf_iters",
    "buffer_size": "replay_size memory_size buffer",
    "learning_starts": "start_steps warmup warmup_steps",
    "tau": "polyak",
    "gradient_steps": "utd utd_ratio",
    "ent_coef_lr": "ent_rate",
    "target_entropy_fraction": "target_entropy_share",
}
_HERE = {name: here for here, names in _ELSEWHERE.items() for name in names.split()}


def suggest(name: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for the known name that is meant elsewhere by ``name``, or the nearest, or nothing."""
    spelled = {_bare(word): word for word in known}
    bare = _bare(name)
    same = [word for word in spelled if word in (bare, _HERE.get(bare)) or word.endswith(f".{bare}")]
    near = same or difflib.get_close_matches(bare, list(spelled), n=1, cutoff=0.5)
    return f" (did you mean {spelled[near[0]]!r}?)" if near else ""


def _bare(name: str) -> str:
    """A name without what its spelling on the command line, or as name=value, adds."""
    return name.partition("=")[0].lstrip("-").replace("-", "_").lower()
