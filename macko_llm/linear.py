"""A linear layer whose weight is a packed matrix."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from macko_llm.defaults import LAYOUT, TOKENS_AT_A_TIME
from macko_llm.errors import FormatError
from macko_llm.format import ENTRY_ALIGNMENT, MackoMatrix
from macko_llm.layouts import bitmap, choice, sliced, strips, tiled
from macko_llm.layouts.canonical import Canonical, validate
from macko_llm.layouts.layout import Layout
from macko_llm.layouts.sliced import SlicedMatrix
from macko_llm.layouts.tiled import TiledGroup, TiledMatrix
from macko_llm.packed_checkpoint import ARRAY_NAMES


class MackoLinear(nn.Module):
    """y = x Wᵀ + b like `nn.Linear`, with W in the MACKO format; `layouts.layout.Layout.linear` says how precise y is.

    The layer holds the canonical arrays as parameters or, once arranged for its device, another layout as a buffer and no
    canonical arrays; the layers of a sliced group (`arrange_group`) share that buffer. `state_dict()` gives canonical arrays
    either way, on the CPU where they are not the layer's own, and moving the layer to another device restores them.

    Arrays that come from outside (a state dict, a file, an assignment, offloaded memory) are not yet validated. They are
    before the first product: no kernel checks what it reads, so what has not passed reaches none. The values keep their
    dtype whatever the layer is cast to; the bias is cast as any parameter.

    Args:
        in_features: columns of W.
        out_features: rows of W.
        padded: length of the values array, a multiple of 8.
        bias: whether the layer has one.
        dtype: of the values and the bias, float16 or bfloat16.
        device: "meta" makes a placeholder that a checkpoint fills.
        layout: one of `defaults.LAYOUTS`, which a GPU arranges the layer in where it suits.
        tokens: that will mostly be multiplied at a time, for layout "auto".

    Raises:
        ValueError: padded is not such a multiple, or there is no such layout.
    """

    weight_values: Tensor
    weight_deltas: Tensor
    weight_row_offsets: Tensor
    weight_layout: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        padded: int,
        *,
        bias: bool = False,
        dtype: torch.dtype = torch.float16,
        device: torch.device | str | None = None,
        layout: str = LAYOUT,
        tokens: int = TOKENS_AT_A_TIME,
    ) -> None:
        super().__init__()
        if padded % ENTRY_ALIGNMENT:
            raise ValueError(f"padded is {padded}, not a multiple of {ENTRY_ALIGNMENT}")
        choice.check(layout)
        self.in_features = in_features
        self.out_features = out_features
        self.layout = layout
        self.tokens = tokens
        # Parameters rather than buffers, so that accelerate moves and offloads them like any weight.
        self.weight_values = _constant(torch.zeros(padded, dtype=dtype, device=device))
        self.weight_deltas = _constant(torch.zeros(padded // 2, dtype=torch.uint8, device=device))
        self.weight_row_offsets = _constant(torch.zeros(out_features + 1, dtype=torch.int32, device=device))
        self.bias = _constant(torch.zeros(out_features, dtype=dtype, device=device)) if bias else None
        self.register_buffer("weight_layout", None, persistent=False)
        self._arranged: Layout | None = None
        self._validated: object | None = None
        """What the canonical arrays carry that were validated together."""

    @classmethod
    def from_matrix(cls, matrix: MackoMatrix, bias: Tensor | None = None) -> "MackoLinear":
        """A layer around a matrix and a bias [rows], floating; raises FormatError if the matrix is not valid."""
        rows, cols = matrix.shape
        layer = cls(cols, rows, len(matrix.values), bias=bias is not None, dtype=matrix.values.dtype, device="meta")
        for name, array in zip(ARRAY_NAMES, (matrix.values, matrix.deltas, matrix.row_offsets), strict=True):
            layer._parameters[name] = _constant(array)
        if bias is not None:
            layer.bias = _constant(bias)
        layer.validate("the matrix")
        return layer

    @property
    def packed(self) -> Layout:
        """The weight as it is multiplied.

        Raises:
            FormatError: it is not valid.
        """
        if self._arranged is not None:
            return self._arranged
        if not self._is_validated():
            self.validate("a packed layer")
        return self._canonical()

    @property
    def matrix(self) -> MackoMatrix:
        """The packed weight in canonical order, perhaps not yet validated; shares memory with the layer unless arranged."""
        return self._canonical() if self._arranged is None else self._arranged.canonical()

    @property
    def is_arranged(self) -> bool:
        """Whether the layer holds another layout than the canonical arrays."""
        return self._arranged is not None

    @property
    def qweight(self) -> Tensor:
        """What holds the values, under the name by which PEFT asks a quantized layer for its device."""
        return self.weight_values if self.weight_layout is None else self.weight_layout

    @property
    def device_type(self) -> str:
        """Where the weight lies, "cpu" or "cuda"."""
        return self.qweight.device.type

    def validate(self, name: str) -> None:
        """Check the canonical arrays, unless they are on the meta device: what is computed there reaches no kernel.

        Args:
            name: what errors call the layer.

        Raises:
            FormatError: they break an invariant of the format.
        """
        if self._arranged is None and not self._is_abstract():
            self._hold(validate(self._canonical(), name))

    def arrange(self) -> None:
        """Change canonical arrays on a GPU or a CPU to its fastest layout; elsewhere, and if it does not suit, do nothing.

        Raises:
            FormatError: the arrays are not valid.
        """
        arrange_group([self])

    def restore(self) -> None:
        """Go back to the canonical arrays."""
        if self._arranged is not None:
            self._hold(Canonical.of(self._arranged.canonical()))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features], of x's dtype, or of autocast's; see `Layout.linear`."""
        return self.packed.linear(x, self.bias)

    def _canonical(self) -> Canonical:
        shape = (self.out_features, self.in_features)
        return Canonical(self.weight_values, self.weight_deltas, self.weight_row_offsets, shape)

    def _hold(self, layout: Layout) -> None:
        """Make a valid layout the weight."""
        if layout.buffer is not None:
            for name in ARRAY_NAMES:
                self._parameters[name] = None
            self._arranged, self.weight_layout = layout, layout.buffer
            return
        self._arranged = self.weight_layout = None
        # The arrays bear the mark, not the layer: it must not keep those alive that are offloaded after each forward.
        self._validated = object()
        matrix = layout.canonical()
        for name, array in zip(ARRAY_NAMES, (matrix.values, matrix.deltas, matrix.row_offsets), strict=True):
            if self._parameters.get(name) is not array:
                self._parameters[name] = _constant(array)
            held = self._parameters[name]
            held.macko_validated = self._validated, _version(held)  # type: ignore[union-attr,arg-type]

    def _is_validated(self) -> bool:
        """Whether the canonical arrays are those that were validated, and unchanged.

        A compiler cannot look: what it compiles is for the arrays that are there, and writing to them later goes unseen.
        """
        if torch.compiler.is_compiling():
            return self._validated is not None
        for name in ARRAY_NAMES:
            array = self._parameters[name]
            mark, version = getattr(array, "macko_validated", (None, 0))
            if mark is None or mark is not self._validated or _version(array) != version:  # type: ignore[arg-type]
                return False
        return True

    def _is_abstract(self) -> bool:
        """Whether the arrays are on the meta device, or stand-ins (of a compiler, say): no kernel will read them."""
        arrays = [self._parameters[name] for name in ARRAY_NAMES]
        return any(a is None or a.is_meta or type(a) not in (Tensor, nn.Parameter) for a in arrays)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MackoLinear":
        was_arranged = self.is_arranged
        self.restore()
        arrays = {name: _constant(_moved(getattr(self, name), fn)) for name in ARRAY_NAMES}
        for name in ARRAY_NAMES:
            self._parameters[name] = None  # which torch's own _apply passes by
        try:
            super()._apply(fn, recurse)
        finally:
            self._parameters.update(arrays)  # also where the bias did not fit
        # Casts on a CPU leave canonical arrays alone. to_empty() brings anything at all; whoever multiplies it is told.
        if was_arranged or self.device_type != "cpu":
            with contextlib.suppress(FormatError):
                self.arrange()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self.is_arranged:
            matrix = self.matrix
            for name, array in zip(ARRAY_NAMES, (matrix.values, matrix.deltas, matrix.row_offsets), strict=True):
                destination[prefix + name] = array.cpu()  # a second copy of a model may not fit on its GPU
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        self.restore()
        errors = len(error_msgs)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if len(error_msgs) == errors and not self._is_abstract():
            try:
                self.validate(prefix.removesuffix(".") or "the layer")
                self.arrange()
            except FormatError as error:
                error_msgs.append(str(error))

    def extra_repr(self) -> str:
        """What `print(model)` says of the layer."""
        weight = self._arranged or self._canonical()
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, {weight.summary}, "
            f"dtype={weight.dtype}, bias={self.bias is not None}"
        )


def arrange_group(layers: Sequence[MackoLinear]) -> None:
    """Change layers that read the same input to one layout between them, so that one kernel can multiply them all.

    Each layer still works by itself: as a view of the slices of all, or with tiles of its own, which are cut for the kernel
    of all. Where no layout suits them together, each is arranged alone; so are all if only some are to be tiled.

    Args:
        layers: at least one.

    Raises:
        FormatError: a weight is not valid.
    """
    group = group_of(layers)
    if (len(layers) == 1 and layers[0].is_arranged) or isinstance(group, SlicedMatrix):
        return
    if group is not None and group.is_cut_together:
        return
    for layer in layers:
        if layer.is_arranged:
            continue
        if layer._is_abstract():
            return
        if not layer._is_validated():
            layer.validate("a packed layer")
    if all(layer.device_type == "cpu" for layer in layers):
        for layer in layers:
            if not layer.is_arranged:
                of_bits = bitmap.arrange(layer.matrix)
                layer._hold(strips.arrange(of_bits) or of_bits)
        return
    kinds = {_layout_of(layer) for layer in layers}
    members: Sequence[Layout] | None = None
    if kinds == {"tiled"}:
        members = tiled.arrange_group([layer.matrix for layer in layers])
    if members is None and (kinds == {"sliced"} or len(layers) == 1):
        members = sliced.arrange_group([layer.matrix for layer in layers])
    if members is not None:
        for layer, member in zip(layers, members, strict=True):
            layer._hold(member)
    elif len(layers) > 1:
        for layer in layers:
            layer.arrange()


def _layout_of(layer: MackoLinear) -> str:
    """Of a valid layer on a GPU: "sliced" or "tiled", what it is arranged in or shall be."""
    if layer._arranged is not None:
        return "tiled" if isinstance(layer._arranged, TiledMatrix) else "sliced"
    if layer.device_type != "cuda":
        return "sliced"
    sparsity = 1 - layer.weight_values.numel() / max(layer.out_features * layer.in_features, 1)
    capability = torch.cuda.get_device_capability(layer.weight_values.device)
    return choice.choose(layer.layout, sparsity, layer.tokens, capability)


def group_of(layers: Sequence[MackoLinear]) -> SlicedMatrix | TiledGroup | None:
    """The weights of these layers one below the other, as one kernel multiplies them.

    Returns:
        None unless they are all the members of one sliced group, in its order, or all tiled, with as many columns.
    """
    tiles = [layer._arranged for layer in layers if isinstance(layer._arranged, TiledMatrix)]
    if len(tiles) == len(layers):
        return TiledGroup.of(tiles)
    first = layers[0]._arranged
    if not isinstance(first, SlicedMatrix) or len(layers) != len(first.plan.member_rows):
        return None
    for index, layer in enumerate(layers):
        own = layer._arranged
        if not isinstance(own, SlicedMatrix) or own.data is not first.data or own.member != index:
            return None
    return SlicedMatrix(first.data, first.plan)


def _moved(array: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """What `Module.to` and the like make of an array: they move its bytes, and never change its dtype."""
    data = array.detach().view(torch.uint8)
    moved = fn(data)
    if moved.dtype != torch.uint8:
        moved = data.to(moved.device)
    return moved.view(array.dtype)


def _version(array: Tensor) -> int:
    return 0 if array.is_inference() else array._version


def _constant(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=False)
