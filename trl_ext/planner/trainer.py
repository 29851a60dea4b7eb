"""SFT of a model that plans in concepts and writes from its plan alone.

The differences from SFT: the planner is attached before PEFT wraps the model. `_prepare_dataset` and the collator
separate what the planner reads from what the executor writes. `compute_loss` plans, softly or with the best plan of an
E-step, and executes. After the last backward of each step, gradients are averaged over processes, and the state that
the losses carry across steps is updated. With `use_planner=False` the trainer equals its parent.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import TrainerCallback
from transformers.modeling_outputs import CausalLMOutput
from trl import SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from unsloth_ext.common.logits import logits_of
from unsloth_ext.common.wrapping import backbone_of, unwrapped
from unsloth_ext.planner.executor import executor_forward, executor_prefix, text_nll
from unsloth_ext.planner.head import HEAD, with_planner_modules
from unsloth_ext.planner.planning import plan, plan_soft
from unsloth_ext.planner.vocabulary import plan_lengths

from ..common.all_reduce import all_reduce_sum
from ..common.checkpointing import SafeCheckpointMixin
from ..common.engines import check_engine
from ..common.fingerprint import content_hash
from ..common.gradients import average_gradients
from ..common.metric_sums import Sums
from ..common.model_loading import (
    check_name,
    default_args,
    keeping_master_weights,
    no_router_loss,
    preparing_models,
    with_adapter,
)
from ..common.one_unit import OneUnitMixin
from ..common.parameter_groups import split_by_role
from ..common.state_file import save_state
from ..common.update_sizes import UpdateSizesMixin
from . import monitors
from .config import PlannerExecutorConfig
from .data import COLUMNS, HASHED, SAMPLE_ID, PlannerCollator, RowSplitter, cut, prepare
from .em import EStep, e_step, number_of_plans
from .losses import (
    commitment_loss,
    expected_and_chosen,
    expected_use,
    hard_use,
    loss_eos,
    mean_entropy,
    plan_predictions,
    signal_nll,
)
from .method import METHOD
from .monitor_callback import PlannerMonitorCallback
from .preparation import attach, check_given, check_method
from .probe import probe
from .state import check_planner_state, load_planner_state, new_state


Batch = dict[str, torch.Tensor]
Logged = dict[str, torch.Tensor]


class PlannerExecutorTrainer(OneUnitMixin, UpdateSizesMixin, SafeCheckpointMixin, SFTTrainer):
    """SFT of planner and executor. Ours. A planner is attached before PEFT wraps the model, if it has none.

    With `peft_config`, the base model, its embedding and its LM head are frozen. Without it, the whole model is
    trained.

    Args:
        model: the model to train, or its name.
        args: the configuration; None: the defaults.
        *others: further arguments of `SFTTrainer`.
        **keywords: further arguments of `SFTTrainer`.

    Attributes:
        planner_state: state that a checkpoint keeps beside the weights.
        last_e_step: the `EStep` of the last batch that had one.

    Raises:
        ValueError: in the constructor, for rows that cannot be split, a model that cannot plan or whose adapter would
            not train the planner, and under DeepSpeed and FSDP.
    """

    _tag_names = ["trl", "planner-executor"]
    _name = "Planner-executor"
    _latent_method = "planner"

    def __init__(self, model: Any, args: PlannerExecutorConfig | None = None, *others: Any, **keywords: Any):
        args = default_args(model, PlannerExecutorConfig, self._name) if args is None else args
        if not isinstance(args, PlannerExecutorConfig):
            raise ValueError(f"args is a {type(args).__name__}; planning needs a PlannerExecutorConfig")
        check_name(model)
        if not args.use_planner:
            model, keywords["peft_config"] = with_adapter(model, keywords.get("peft_config"), args.seed)
            super().__init__(model, args, *others, **keywords)
            return
        check_engine(args, self._name)
        given = dict(
            zip(("data_collator", "train_dataset", "eval_dataset", "processing_class", "compute_loss_func"), others)
        )
        check_given({**given, **keywords}, args)
        lora = keywords["peft_config"] = copy.deepcopy(keywords.get("peft_config"))
        if lora is not None:
            check_method(lora)
            vars(lora).update(with_planner_modules(lora))
        if args.n_gpu > 1:
            args._n_gpu = 1  # disable nn.DataParallel: its replicas would plan separately
        if not isinstance(model, str):
            attach(model, args)
            model, keywords["peft_config"] = with_adapter(model, lora, args.seed)
        with preparing_models(self._stock_init, lambda x: attach(x, args)), keeping_master_weights(self, model):
            super().__init__(model, args, *others, **keywords)
        no_router_loss(self, "planner and executor do not call the model's own forward")
        # Not a wrapper of the parent's collator, which may be another one under Unsloth
        self.data_collator = PlannerCollator(
            DataCollatorForLanguageModeling(self._tokenizer.pad_token_id, pad_to_multiple_of=args.pad_to_multiple_of)
        )
        # Our loss is scaled by the number of tokens, and its labels are shifted
        self.model_accepts_loss_kwargs = self._loss_shifts_labels = True
        config = backbone_of(self.model).planner_config
        rows = max(self.train_dataset[SAMPLE_ID]) + 1 if args.training == "hard_em" else 0
        self.planner_state, self._possible_plans = new_state(args, config, rows), number_of_plans(config)
        self.last_e_step: EStep | None = None
        self._sums = {"train": Sums(), "eval": Sums()}
        self._gradient_norm = monitors.GradientNorm()
        self._introduce()

    # -- callbacks --------------------------------------------------------------------------------------------------

    def _introduce(self) -> None:
        """Attach this trainer to the monitor callback."""
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, PlannerMonitorCallback):
                callback.trainer = self

    def add_callback(self, callback: type[TrainerCallback] | TrainerCallback) -> None:
        super().add_callback(callback)
        if self.args.use_planner:
            self._introduce()

    def _load_callback_state(self) -> None:
        super()._load_callback_state()
        if self.args.use_planner:
            self._introduce()

    # -- data -------------------------------------------------------------------------------------------------------

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        parents = super()._prepare_dataset
        if not args.use_planner:
            return parents(dataset, processing_class, args, packing, formatting_func, dataset_name)
        splitter = RowSplitter(args.mode, self._tokenizer.eos_token_id, dataset_name)
        return prepare(
            dataset, splitter, lambda x: parents(x, processing_class, args, packing, formatting_func, dataset_name)
        )

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self.args.use_planner:
            self._signature_columns = list(COLUMNS)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        if not self.args.use_planner:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        length = self.planner_state["curriculum"].length if "curriculum" in self.planner_state else None
        batches = (cut(batch, length, self.args.mode) for batch in epoch_iterator)
        samples, items = super().get_batch_samples(batches, num_batches, device)
        rows = torch.tensor(sum(len(batch["input_ids"]) for batch in samples), device=device)
        self._step_rows = self.accelerator.gather(rows).sum().item() if self._across_processes() else rows.item()
        return samples, items

    # -- loss -------------------------------------------------------------------------------------------------------

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not self.args.use_planner:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        scored = inputs["labels"][:, 1:] != -100
        if not self.model.training:
            with self.accelerator.autocast():
                return self._within_forward(model, self._evaluated, inputs, scored, return_outputs)
        per_item, share = 1 / scored.sum().clamp(min=1), 1.0
        if num_items_in_batch is not None:  # scaled as a part of the whole step, for the mean over processes
            processes = self.accelerator.num_processes if self._across_processes() else 1
            per_item = processes / torch.as_tensor(num_items_in_batch).clamp(min=1)
            share = len(scored) * processes / self._step_rows
        make = self._soft_loss if self.args.training == "soft" else self._em_loss
        with self.accelerator.autocast():
            loss, parts = self._within_forward(model, make, inputs, scored, per_item, share)
        self._note(**parts, tokens=inputs["attention_mask"].sum())
        return (loss, CausalLMOutput()) if return_outputs else loss

    def _soft_loss(
        self, model: nn.Module, inputs: Batch, scored: torch.Tensor, per_item: torch.Tensor, share: float
    ) -> tuple[torch.Tensor, Logged]:
        """The soft loss, and its terms to log. Both are sums over micro-batches of a step.

        Args:
            model: the model.
            inputs: a batch of `PlannerCollator`.
            scored (B, T): bool; tokens that count.
            per_item: scalar float; factor of sums over tokens.
            share: factor of means over rows.
        """
        args, types = self.args, backbone_of(model).planner_config.types
        soft = plan_soft(model, inputs["plan_input_ids"], inputs["plan_attention_mask"], self.temperature)
        self._gradient_norm.watch(soft.embeds)
        executor = self._executor_nll(model, inputs, soft, scored).sum() * per_item
        uses = [expected_use(soft, i) for i in range(len(types))]
        terms = {
            "commitment": (args.commitment_weight, commitment_loss(soft).mean()),
            "eos": (args.eos_weight, loss_eos(soft, [kind.quota for kind in types]).mean()),
            "usage": (args.usage_weight, self.planner_state["usage"].loss([self._all_reduce_sum(use) for use in uses])),
        }
        if "quota" in self.planner_state:
            lengths, rows = soft.expected_lengths.sum(0), torch.tensor(len(scored), device=scored.device)
            mean = self._all_reduce_sum(lengths) / self._all_reduce_sum(rows)
            terms["quota"] = (args.quota_weight, self.planner_state["quota"].loss(mean))
            self._note(lengths=lengths, rows=rows)
        self._note(use=torch.cat(uses))
        opens = [soft.open[:, i, : log_probs.shape[1]] for i, log_probs in enumerate(soft.log_probs)]
        self._watch_plans(soft.soft, soft.hard, soft.ids, soft.expected_lengths, soft.log_probs, opens)
        terms |= self._shared_terms(model, inputs, soft, scored, per_item / share, soft.log_probs, opens)
        loss = executor + share * sum(weight * term for weight, term in terms.values() if weight)
        return loss, {"loss/executor": executor, **{f"loss/{name}": share * term for name, (_, term) in terms.items()}}

    def _em_loss(
        self, model: nn.Module, inputs: Batch, scored: torch.Tensor, per_item: torch.Tensor, share: float
    ) -> tuple[torch.Tensor, Logged]:
        """The loss of the M-step on the best plans known; as `_soft_loss`."""
        types = backbone_of(model).planner_config.types
        plans = self._best_plans(model, inputs)
        executor = self._executor_nll(model, inputs, plans, scored).sum() * per_item
        read = inputs["plan_input_ids"], inputs["plan_attention_mask"]
        likely, log_probs, opens = plan_predictions(model, *read, plans, self._gradient_norm.watch)
        planner = -likely.sum() * per_item
        self._note(use=torch.cat([hard_use(plans, i, kind.num_concepts) for i, kind in enumerate(types)]))
        soft, hard = expected_and_chosen(model, log_probs, plans, self.temperature)
        self._watch_plans(soft, hard, plans, plan_lengths(plans), log_probs, opens)
        terms = self._shared_terms(model, inputs, plans, scored, per_item / share, log_probs, opens)
        parts = {"loss/executor": executor, "loss/planner": planner}
        loss = executor + self.args.planner_weight * planner
        loss = loss + share * sum(weight * term for weight, term in terms.values())
        return loss, {**parts, **{f"loss/{name}": share * term for name, (_, term) in terms.items()}}

    def _shared_terms(
        self,
        model: nn.Module,
        inputs: Batch,
        plans: Any,
        scored: torch.Tensor,
        per_item: torch.Tensor,
        log_probs: Any,
        opens: list[torch.Tensor],
    ) -> dict[str, tuple[float, torch.Tensor]]:
        """The active terms that both trainings have, each with its weight."""
        args, terms = self.args, {}
        if args.signal_weight:
            terms["signal"] = args.signal_weight, signal_nll(model, inputs, plans, scored) * per_item
        if args.entropy_weight:
            terms["entropy"] = args.entropy_weight, -mean_entropy(log_probs, opens)
        return terms

    @torch.no_grad()
    def _watch_plans(
        self,
        soft: torch.Tensor,
        hard: torch.Tensor,
        ids: torch.Tensor,
        lengths: torch.Tensor,
        log_probs: Any,
        opens: list[torch.Tensor],
    ) -> None:
        """Record values for the monitors.

        Args:
            soft, hard (B, n, Q, d): float; expected and chosen codewords.
            ids (B, n, Q): long; the plans.
            lengths (B, n): the (expected) lengths.
            log_probs, opens: for each type, log-probabilities of predictions, and which of them count.
        """
        alive, rows = ids >= 0, torch.tensor(len(ids), device=ids.device)
        cos, l2 = monitors.cosine_and_l2(soft, hard, alive)
        means = {"monitor/cos": (cos, alive.sum()), "monitor/l2": (l2, alive.sum())}
        for i, kind in enumerate(backbone_of(self.model).planner_config.types):
            means[f"planner/expected_length_{kind.name}"] = lengths[:, i].double().mean(), rows
            for name, mean in zip(("entropy", "max_prob"), monitors.entropy_and_max_prob(log_probs[i], opens[i])):
                means[f"monitor/{name}_{kind.name}"] = mean, opens[i].sum()
        self._sums["train"].weigh({name: (mean * count, count) for name, (mean, count) in means.items()})

    def _executor_nll(self, model: nn.Module, inputs: Batch, plans: Any, scored: torch.Tensor) -> torch.Tensor:
        """The executor's NLL (B, T) after dropout of plans and words; 0 at tokens that do not count."""
        ids, args = inputs["input_ids"], self.args
        null = torch.rand(len(ids), device=ids.device) < args.z_dropout if args.z_dropout else None
        dropped = torch.rand(ids.shape, device=ids.device) < args.word_dropout if args.word_dropout else None
        nll = text_nll(model, executor_prefix(model, plans, null), ids, inputs["attention_mask"], dropped) * scored
        if "curriculum" in self.planner_state:
            at = self.planner_state["curriculum"].bucket
            counted = scored[:, at] if null is None else scored[:, at] & ~null[:, None]
            self._note(bucket=torch.stack([(nll[:, at] * counted).sum(), counted.sum()]))
        return nll

    @property
    def temperature(self) -> float:
        """The temperature of this step."""
        args = self.args
        end = args.temperature if args.temperature_end is None else args.temperature_end
        return args.temperature * (end / args.temperature) ** (self.state.global_step / max(1, self.state.max_steps))

    def _all_reduce_sum(self, local: torch.Tensor) -> torch.Tensor:
        return all_reduce_sum(local, lambda x: self.accelerator.reduce(x, "sum"), self.accelerator.num_processes)

    def _across_processes(self) -> bool:
        return self.args.average_tokens_across_devices and self.accelerator.num_processes > 1

    # -- E-step -----------------------------------------------------------------------------------------------------

    def _best_plans(self, model: nn.Module, inputs: Batch) -> torch.Tensor:
        """The best plans z* (B, n, Q) of the batch's rows.

        An E-step is run first, for all rows if it is due, otherwise for rows without a plan.
        """
        args, cache, ids = self.args, self.planner_state["cache"], inputs[SAMPLE_ID]
        plans, known = cache.get(ids)
        due = self.planner_state["schedule"].due(self.state.global_step, args.e_step_every)
        rows = (~known | due).nonzero()[:, 0]
        sums = torch.zeros(6, device=ids.device)
        if len(rows):
            beams = min(args.num_beams, self._possible_plans)  # a callback may have raised num_beams
            forced = torch.rand(len(rows), device=ids.device) < args.forced_share if args.forced_share else None
            found = self.last_e_step = e_step(
                model,
                {name: value[rows] for name, value in inputs.items()},
                plans[rows],
                known[rows],
                args.num_candidates,
                beams,
                self.temperature,
                args.beam_diversity,
                forced,
            )
            plans, sums = plans.index_copy(0, rows, found.plans), found.sums()
        self._note(e_step=sums)
        new = torch.full_like(ids, -1).index_copy(0, rows, ids[rows])
        # Another process may get the row in the next epoch
        same = (self.accelerator.pad_across_processes(x, pad_index=-1) for x in (new, plans))
        cache.put(*(self.accelerator.gather(x) for x in same))
        return plans

    # -- the end of a step ------------------------------------------------------------------------------------------

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        if self.args.use_planner and self.accelerator.sync_gradients:
            if self.accelerator.num_processes > 1 and not self._sharded():  # FSDP2 and DeepSpeed average them
                trained = [p for p in self.model.parameters() if p.requires_grad]
                average_gradients(trained, self._mean)
            self._end_step()
        return loss

    def _note(self, **sums: torch.Tensor) -> None:
        """Add to the sums of this step on this process. Every process must add the same names."""
        self._sums["train"].add(**sums)

    def _log(self, mode: str) -> dict[str, torch.Tensor]:
        """Log metrics of all processes from the noted sums, and return the sums."""
        sums, means = self._sums[mode].pop(lambda x: self.accelerator.reduce(x, "sum"))
        parts = {
            name: x.item() / self.accelerator.num_processes for name, x in sums.items() if name.startswith("loss/")
        }
        for name, value in {**parts, **means}.items():
            self._metrics[mode][name].append(value)
        return sums

    @torch.no_grad()
    def _end_step(self) -> None:
        """Update the state carried across steps from sums over micro-batches and ranks."""
        state, args, step, metrics = self.planner_state, self.args, self.state.global_step, self._metrics["train"]
        types = backbone_of(self.model).planner_config.types
        norm = self._gradient_norm.pop()
        if norm is not None:
            self._note(norm=torch.tensor(norm, device=args.device).double().square())
        sums = self._log("train")
        self._total_train_tokens += int(sums["tokens"])
        metrics["num_tokens"] = [self._total_train_tokens]
        metrics["planner/temperature"].append(self.temperature)
        if norm is not None:  # each rank's loss is multiplied by the number of ranks
            metrics["monitor/planner_grad_norm"].append(sums["norm"].item() ** 0.5 / self.accelerator.num_processes)
        state["usage"].update(sums["use"].float().split([kind.num_concepts for kind in types]))
        for i, kind in enumerate(types):
            metrics[f"planner/perplexity_{kind.name}"].append(state["usage"].perplexity(i))
        if "quota" in state:
            state["quota"].update(sums["lengths"] / sums["rows"])
        if "curriculum" in state:
            metrics["planner/length"].append(state["curriculum"].length or 0)
            state["curriculum"].update(*sums["bucket"].tolist(), step + 1, self.state.max_steps)
        if "schedule" in state:
            due = state["schedule"].due(step, args.e_step_every)
            found = zip(("em/staleness", "em/flip_rate", "em/margin"), sums["e_step"].view(3, 2))
            means = {name: (total / count).item() for name, (total, count) in found if count}
            for name, mean in means.items():
                metrics[name].append(mean)
            metrics["em/interval"].append(state["schedule"].interval(args.e_step_every))
            if due:
                state["schedule"].done(step, args.e_step_every, means.get("em/staleness"))

    # -- evaluation -------------------------------------------------------------------------------------------------

    def evaluation_loop(self, *args, **kwargs):
        output = super().evaluation_loop(*args, **kwargs)
        if self.args.use_planner:
            self._log("eval")
        return output

    def _evaluated(self, model: nn.Module, inputs: Batch, scored: torch.Tensor, return_outputs: bool) -> Any:
        """The executor's cross-entropy under greedy plans. The cross-entropy without a plan is logged beside it."""
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        plans = plan(model, inputs["plan_input_ids"], inputs["plan_attention_mask"])
        prefix = executor_prefix(model, plans)
        null = executor_prefix(model, plans, torch.ones_like(ids[:, 0], dtype=torch.bool))
        nll, without = ((text_nll(model, p, ids, mask) * scored).sum() for p in (prefix, null))
        tokens, rows = scored.sum(), torch.tensor(len(ids), device=ids.device)
        means = {
            "loss/executor": (nll, tokens),
            "nll_null": (without, tokens),
            "delta_nll_null": (without - nll, tokens),
        }
        for kind, length in zip(backbone_of(model).planner_config.types, plan_lengths(plans).sum(0)):
            means[f"planner/expected_length_{kind.name}"] = length, rows
        self._sums["eval"].weigh(means)
        self._metrics["eval"]["num_tokens"] = [self._total_train_tokens]
        loss = nll / scored.sum().clamp(min=1)
        if not return_outputs:
            return loss
        logits = logits_of(unwrapped(model), executor_forward(model, prefix, ids, mask))
        return loss, CausalLMOutput(logits=F.pad(logits, (0, 0, 0, 1)))  # pad: the last position predicts nothing

    def probe(self, inputs: Batch) -> dict[str, float]:
        """Cost of other plans and NLL by position for the first 16 rows of a batch (B, ...) of the collator; see
        `probe.probe`.

        It does not change the run's random state. Each process measures its own batch. The tensors are long.

        Raises:
            ValueError: the run has no planner.
        """
        if not self.args.use_planner:
            raise ValueError("use_planner=False: there is no plan to probe")
        with self.accelerator.autocast():
            return probe(self.model, self._prepare_inputs(inputs), torch.Generator().manual_seed(self.args.seed))

    # -- learning rate and checkpoints ------------------------------------------------------------------------------

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if fresh and self.args.use_planner and self.args.planner_learning_rate is not None:
            split_by_role(optimizer, self.model, {HEAD: self.args.planner_learning_rate})
        return optimizer

    def _settings(self) -> dict[str, Any]:
        """The settings that a checkpoint must match."""
        args = self.args
        found = {**self.model.config.planner, "mode": args.mode, "training": args.training}
        return found | ({"dataset": content_hash(self.train_dataset, HASHED)} if args.training == "hard_em" else {})

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.use_planner and self.args.should_save:
            save_state(output_dir, METHOD.name, self.planner_state.state_dict(), self._settings())

    def _check_checkpoint(self, checkpoint: Path) -> None:
        super()._check_checkpoint(checkpoint)
        if self.args.use_planner:
            check_planner_state(checkpoint, self.planner_state, self._settings())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.args.use_planner:
            load_planner_state(checkpoint, self.planner_state)
