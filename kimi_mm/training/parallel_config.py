"""How a run is spread over processes: the section `parallel` of a recipe."""

from __future__ import annotations

from dataclasses import dataclass

from kimi_mm.config_base import Config, ConfigError, choice


@dataclass(frozen=True, kw_only=True)
class ParallelConfig(Config):
    """Spreads one run over the processes that torchrun or accelerate starts; none of it changes what is computed.

    Args:
        data: "ddp" keeps all weights on every process, "fsdp" shards weights, gradients and optimiser (FSDP2).
        expert: processes that share the experts of a layer.
        context: processes that share the rows of a batch, each holding a stretch of every row.
        checkpoint_activations: keeps only what passes between layers for the backward pass.
        compile: torch.compile for dense MLPs and shared experts; mixers and routed experts have kernels of their own.
    """

    data: str = "ddp"
    expert: int = 1
    context: int = 1
    checkpoint_activations: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        choice("data", self.data, ("ddp", "fsdp"))
        if self.expert < 1 or self.context < 1:
            raise ConfigError(f"expert={self.expert} and context={self.context} must be at least 1.")

    def check_world(self, world: int, num_experts: int | None, micro_batches: int) -> None:
        """Raises ConfigError, saying what to change, unless `world` processes can run this way.

        Args:
            world: processes of the run.
            num_experts: of a layer, or None without experts.
            micro_batches: `gradient_accumulation` of the recipe.
        """
        for key in ("expert", "context"):
            if world % getattr(self, key):
                raise ConfigError(f"parallel.{key}={getattr(self, key)} does not divide the {world} processes.")
        data = world // self.context
        if micro_batches % data:
            raise ConfigError(
                f"gradient_accumulation={micro_batches} micro-batches cannot be shared by {data} groups of processes "
                f"equally; make it a multiple of {data} (a step is the same on any number of processes)."
            )
        if self.expert > 1:
            if num_experts is None:
                raise ConfigError(f"parallel.expert={self.expert}: the model has no experts.")
            if num_experts % self.expert:
                raise ConfigError(f"parallel.expert={self.expert} does not divide the {num_experts} experts.")
