"""The passes over a step's batches: the gradient of a training batch, and the loss and accuracy of a validation batch.

A batch goes through the model in micro-batches (gradient accumulation), which only split it: every image's loss counts
1 / (images in the global batch). On a GPU the passes over a micro-batch can be captured as CUDA graphs and replayed, so that the GPU
does not wait for Python to launch a thousand small kernels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection
from functools import partial
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffvit.data.batches import Prepare
from diffvit.dataset import ImageSet
from diffvit.errors import UserError, first_line
from diffvit.kernels.dropout import at_image, has_kernels, seed_masks
from diffvit.loop.loss_scale import LossScale
from diffvit.machine.device import autocast

T = TypeVar("T")

# A width that dropout's kernels have, wherever they have any.
_DRAWN_TOGETHER = 8


class Passes:
    """Passes of a model over batches, on the device that the model is on.

    Args:
        prepare: turns pixels into the model's input.
        micro_batch: images per training pass. Out of memory, it is halved and the batch repeated.
        evaluation_batch: the same for validation; default: the micro-batch.
        graphs: replay CUDA graphs, for the shapes given to `capture`.
        group: (rank, workers) of this process.
        loss_scale: default: none, the loss as it is.

    Attributes:
        micro_batch, evaluation_batch: as they are now.
    """

    def __init__(
        self,
        model: nn.Module,
        prepare: Prepare,
        *,
        precision: str,
        micro_batch: int,
        evaluation_batch: int | None = None,
        graphs: bool = False,
        group: tuple[int, int] = (0, 1),
        loss_scale: LossScale | None = None,
    ):
        self.micro_batch, self.evaluation_batch = micro_batch, evaluation_batch or micro_batch
        self._model, self._prepare, self._precision = model, prepare, precision
        self._device = next(model.parameters()).device
        self._loss_scale = loss_scale or LossScale(self._device, "fp32")
        self._rank, self._workers = group
        self._parallel: nn.Module = nn.parallel.DistributedDataParallel(model) if self._workers > 1 else model
        self._graphs = _Graphs() if graphs and self._workers == 1 else None
        # Sums over the micro-batches of a batch: of the training loss; of the validation loss and of right answers.
        self._train_sums, self._val_sums = torch.zeros(1, device=self._device), torch.zeros(2, device=self._device)
        self._captured_for: tuple[ImageSet, Collection[int], ImageSet, Collection[int]] | None = None

    def differentiate(self, batch: tuple[Tensor, Tensor], images: int, seed: int) -> Tensor:
        """Add a training batch's gradient, times the loss scale, to the parameters'. Returns this process's part of the batch's mean loss.

        Args:
            batch: pixels and labels, this process's part of the global batch.
            images: in the global batch.
            seed: of dropout's masks.
        """
        return self._within_memory(lambda: self._differentiate(batch, images, seed))

    def validate(self, batch: tuple[Tensor, Tensor], images: int) -> tuple[Tensor, Tensor]:
        """This process's part of a validation batch's mean loss and accuracy; see differentiate."""
        return self._within_memory(lambda: self._validate(batch, images))

    def zero_gradients(self) -> None:
        """Zero the gradients."""
        for parameter in self._model.parameters():
            if self._graphs is None:
                parameter.grad = None
            elif parameter.grad is None:  # a graph adds to the memory that was there when it was captured
                parameter.grad = torch.zeros_like(parameter)
        if self._graphs is not None:
            torch._foreach_zero_([parameter.grad for parameter in self._model.parameters() if parameter.grad is not None])

    def capture(self, train_set: ImageSet, train_lengths: Collection[int], val_set: ImageSet, val_lengths: Collection[int]) -> None:
        """Capture graphs for batches of these lengths; without graphs, nothing. What is not captured is computed all the same."""
        if self._graphs is not None:
            self._captured_for = (train_set, train_lengths, val_set, val_lengths)
            self._within_memory(self._capture)

    # One attempt each

    def _differentiate(self, batch: tuple[Tensor, Tensor], images: int, seed: int) -> Tensor:
        seed_masks(self._device, seed, (self._rank, self._workers))
        self._train_sums.zero_()
        pixels, labels = batch
        if not len(labels):  # a last batch smaller than the group: take part in the exchange of gradients with zeros
            (self._logits(self._parallel, pixels.new_zeros((1, *pixels.shape[1:]))).sum() * 0.0).backward()
        for first in range(0, len(labels), self.micro_batch):
            at_image(self._device, self._rank + first * self._workers)
            chunk = pixels[first : first + self.micro_batch], labels[first : first + self.micro_batch]
            more = self._workers > 1 and first + self.micro_batch < len(labels)
            with self._parallel.no_sync() if more else contextlib.nullcontext():  # type: ignore[operator]
                self._run(self._training_pass, chunk, images)
        return self._train_sums[0].clone()

    def _validate(self, batch: tuple[Tensor, Tensor], images: int) -> tuple[Tensor, Tensor]:
        self._val_sums.zero_()
        pixels, labels = batch
        self._model.eval()
        for first in range(0, len(labels), self.evaluation_batch):
            chunk = pixels[first : first + self.evaluation_batch], labels[first : first + self.evaluation_batch]
            self._run(self._validation_pass, chunk, images)
        self._model.train()
        loss, right = self._val_sums.clone()
        return loss, right

    def _capture(self) -> None:
        assert self._graphs is not None and self._captured_for is not None
        train_set, train_lengths, val_set, val_lengths = self._captured_for
        self._graphs.forget()
        self.zero_gradients()
        shapes = [(self._training_pass, train_set, train_lengths, self.micro_batch, True)]
        shapes += [(self._validation_pass, val_set, val_lengths, self.evaluation_batch, False)]
        calls = []
        for work, images, lengths, most, training in shapes:
            for length in sorted({n for whole in lengths for n in (min(whole, most), whole % most) if n}, reverse=True):
                pixels, labels = images.pixels[:1].repeat(length, 1, 1, 1), images.labels[:1].repeat(length)
                calls.append((work, (pixels, labels, self._count(length)), training))
        try:
            # All of it first as it is: what must be compiled, loaded or tuned must not be so in a capture.
            right = [self._outcome(partial(self._graphs.warm_up, work, inputs), training) for work, inputs, training in calls]
            for work, inputs, training in calls:
                self._model.train(training)
                self._graphs.capture(work, inputs)
            replayed = [self._outcome(partial(self._graphs.replay, work, inputs), training) for work, inputs, training in calls]
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise UserError(f"CUDA graphs do not work here: {first_line(error)[:200]}", "give --graphs false.") from error
        # Only masks that are functions, not draws, are the same twice.
        if has_kernels(self._device, _DRAWN_TOGETHER) and not torch.allclose(torch.stack(replayed), torch.stack(right), 0.02, 1e-4, True):
            raise UserError("CUDA graphs do not give what they were captured from.", "give --graphs false, and tell us.")
        self._model.train()
        self.zero_gradients()

    def _outcome(self, run: Callable[[], object], training: bool) -> Tensor:
        """The sums and the gradient's norm that a pass leaves behind."""
        for sums in (self._train_sums, self._val_sums):
            sums.zero_()
        self.zero_gradients()
        self._model.train(training)
        run()
        norm = nn.utils.get_total_norm([p.grad for p in self._model.parameters() if p.grad is not None])
        return torch.cat([self._train_sums, self._val_sums, norm.view(1)])

    # The passes over a micro-batch

    def _run(self, work: Callable[[Tensor, Tensor, Tensor], None], chunk: tuple[Tensor, Tensor], images: int) -> None:
        inputs = (*chunk, self._count(images))
        if self._graphs is None or not self._graphs.replay(work, inputs):
            work(*inputs)

    def _count(self, images: int) -> Tensor:
        return torch.full((), float(images), device=self._device)  # filled there: a copy would be waited for

    def _training_pass(self, pixels: Tensor, labels: Tensor, images: Tensor) -> None:
        loss = F.cross_entropy(self._logits(self._parallel, pixels), labels, reduction="sum") / images
        self._loss_scale.scaled(loss * self._workers).backward()  # the group takes the mean of its gradients; a step wants their sum
        self._train_sums += loss.detach()

    @torch.no_grad()
    def _validation_pass(self, pixels: Tensor, labels: Tensor, images: Tensor) -> None:
        logits = self._logits(self._model, pixels)
        right = (logits.argmax(1) == labels).sum().float()
        self._val_sums += torch.stack([F.cross_entropy(logits, labels, reduction="sum"), right]) / images

    def _logits(self, net: nn.Module, pixels: Tensor) -> Tensor:
        with autocast(self._device, self._precision):
            return net(self._prepare(pixels)).float()

    def _within_memory(self, attempt: Callable[[], T]) -> T:
        """Return what the attempt returns; out of memory, retry with half the micro-batch. A group cannot: the others wait."""
        while True:
            try:
                return attempt()
            except RuntimeError as error:
                if self._workers > 1 or not is_out_of_memory(error):
                    raise
                if self.micro_batch == self.evaluation_batch == 1:
                    raise UserError("a single image does not fit into memory.", "give --recompute, or use a device with more.") from error
            # Only here, behind the error, is what it held free.
            largest = max(self.micro_batch, self.evaluation_batch)
            self.evaluation_batch = min(self.evaluation_batch, -(-largest // 2))
            self.micro_batch = min(self.micro_batch, -(-largest // 2))
            if self._graphs is not None:
                self._graphs.forget()
            self.zero_gradients()
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
            if self._captured_for and attempt != self._capture:
                self._within_memory(self._capture)


_OUT_OF_MEMORY = ("DefaultCPUAllocator: can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException | None) -> bool:
    """A GPU's memory has an error of its own, and with libraries a sentence as a CPU's has; a capture that it ended may raise another."""
    if error is None:
        return False
    named = any(text in str(error) for text in _OUT_OF_MEMORY)
    return named or isinstance(error, torch.OutOfMemoryError) or is_out_of_memory(error.__context__)


class _Graphs:
    """Functions of tensors as CUDA graphs, one for each shape. They write to outer tensors and return nothing.

    All share one pool of memory, for they run one after another and leave nothing in it.
    """

    def __init__(self) -> None:
        self._beside: torch.cuda.Stream | None = None  # one for all, for each keeps memory of its own
        self.forget()

    def forget(self) -> None:
        """Drop all graphs and their memory."""
        self._captured: dict[object, tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]] = {}
        self._pool: object = None

    def warm_up(self, work: Callable[..., None], inputs: tuple[Tensor, ...]) -> None:
        """Run it once as it will be captured: on a stream beside the usual one."""
        beside = self._beside = self._beside or torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(beside):
                work(*inputs)
        finally:
            torch.cuda.current_stream().wait_stream(beside)

    def capture(self, work: Callable[..., None], inputs: tuple[Tensor, ...]) -> None:
        """Capture it with these inputs, which are then the graph's own."""
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the GPU meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):  # type: ignore[arg-type]
            work(*inputs)
        self._pool = graph.pool()
        self._captured[_shape_of(work, inputs)] = (graph, inputs)

    def replay(self, work: Callable[..., None], inputs: tuple[Tensor, ...]) -> bool:
        """Replay the graph for these shapes. Returns False if there is none."""
        graph, own = self._captured.get(_shape_of(work, inputs), (None, ()))
        if graph is None:
            return False
        for mine, given in zip(own, inputs, strict=True):
            mine.copy_(given)
        graph.replay()
        return True


def _shape_of(work: Callable[..., None], inputs: tuple[Tensor, ...]) -> object:
    return work.__name__, *(tensor.shape for tensor in inputs)
