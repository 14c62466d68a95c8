"""TTT-Linear and TTT-MLP: everything around the scan, once, and the two inner models."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from tttc._checks import check_mini_batch_size, check_positive
from tttc.nn.conv import CausalConv
from tttc.nn.inner import (
    INNER_EPS,
    Carry,
    LinearWeights,
    MLPWeights,
    Norm,
    Token,
    linear_step,
    mlp_step,
)
from tttc.nn.rotary import rotary
from tttc.scan import ScanState, scan

INIT_STD = 0.02


class TTTState(NamedTuple):
    """Where a layer stands in a sequence: give it back to read on.

    ``scan`` is the state of the inner model; ``conv`` the last ``conv_kernel - 1`` inputs of the
    convolutions, ``[B, conv_kernel - 1, hidden_size]``, None without ``share_qk``.
    """

    scan: ScanState
    conv: torch.Tensor | None


class TTTLayer(nn.Module):
    """What TTT-Linear and TTT-MLP have in common; a subclass gives the inner model.

    A subclass sets ``step`` and implements :meth:`initial_weights`; it registers the parameters that
    method returns before anything is initialised, in :meth:`add_fast_weights`.
    """

    step: ClassVar[Any]  # of one token, as :func:`tttc.scan` takes it

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        mini_batch_size: int = 16,
        *,
        gate: bool = False,
        share_qk: bool = False,
        conv_kernel: int = 4,
        base_lr: float = 1.0,
        rope_theta: float = 10000.0,
        eps: float = INNER_EPS,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(hidden_size, "hidden_size")
        check_positive(num_heads, "num_heads")
        check_mini_batch_size(mini_batch_size)
        if hidden_size % num_heads != 0:
            raise ValueError(
                f"hidden_size: expected a multiple of num_heads = {num_heads}, got {hidden_size}"
            )
        head_dim = hidden_size // num_heads
        if head_dim % 2 != 0:
            raise ValueError(
                "hidden_size: expected an even head dimension hidden_size / num_heads for the rotary "
                f"embedding, got {hidden_size} / {num_heads} = {head_dim}"
            )
        self.hidden_size, self.num_heads, self.head_dim = hidden_size, num_heads, head_dim
        self.mini_batch_size = mini_batch_size
        self.base_lr, self.rope_theta = base_lr, rope_theta
        options: dict[str, Any] = {"device": device, "dtype": dtype}

        def projection() -> nn.Linear:
            return nn.Linear(hidden_size, hidden_size, bias=False, **options)

        self.share_qk = share_qk
        if share_qk:
            self.qk_proj = projection()
            self.q_conv = CausalConv(hidden_size, conv_kernel, **options)
            self.k_conv = CausalConv(hidden_size, conv_kernel, **options)
        else:
            self.q_proj, self.k_proj = projection(), projection()
        self.v_proj, self.o_proj = projection(), projection()
        self.g_proj = projection() if gate else None
        self.lr_proj = nn.Linear(hidden_size, num_heads, **options)
        self.tau_offset = nn.Parameter(torch.empty(mini_batch_size, **options))
        self.norm_weight = nn.Parameter(torch.empty(num_heads, head_dim, **options))
        self.norm_bias = nn.Parameter(torch.empty(num_heads, head_dim, **options))
        self.post_norm = nn.LayerNorm(hidden_size, eps=eps, **options)
        self.add_fast_weights(options)
        self.reset_parameters()

    @abstractmethod
    def add_fast_weights(self, options: dict[str, Any]) -> None:
        """Register the initial fast weights, each ``[H, ...]``, uninitialised."""

    @abstractmethod
    def initial_weights(self) -> Any:
        """The initial fast weights as the inner model takes them; leaves ``[H, ...]``."""

    def reset_parameters(self) -> None:
        """Matrices normal with standard deviation 0.02, norms one, biases and offsets zero."""
        for module in self.children():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=INIT_STD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, (CausalConv, nn.LayerNorm)):
                module.reset_parameters()
        nn.init.zeros_(self.tau_offset)
        nn.init.ones_(self.norm_weight)
        nn.init.zeros_(self.norm_bias)
        for leaf in pytree.tree_leaves(self.initial_weights()):
            if leaf.ndim == 3:
                nn.init.normal_(leaf, std=INIT_STD)
            else:
                nn.init.zeros_(leaf)

    def forward(
        self, x: torch.Tensor, state: TTTState | None = None, *, return_state: bool = False
    ) -> Any:
        """Read ``x [B, T, hidden_size]``, on from ``state`` if given.

        Returns y, like x; with ``return_state`` the pair ``(y, TTTState)``.

        Raises:
            TypeError: x is not floating, or ``state`` is no :class:`TTTState`.
            ValueError: x has another rank, last size or device; the state another layer's shapes.
        """
        self._check(x, state)
        place = 0 if state is None else state.scan.place
        position = (torch.arange(x.shape[1], device=x.device) + place) % self.mini_batch_size
        q, k, conv = self._queries_and_keys(x, None if state is None else state.conv)
        q, k, v = (self._split_heads(y) for y in (q, k, self.v_proj(x)))
        # Turned where projections leave them: segments of sequences that lie so are read in place.
        q, k = (
            rotary(y.transpose(1, 2), position[:, None], self.rope_theta).transpose(1, 2)
            for y in (q, k)
        )
        # All leaves in one dtype, so that the outputs of the scan come in it too.
        eta, tau = self._learning_rates(x).to(v.dtype), self._taus(position).to(v.dtype)
        new, z = scan(
            type(self).step,
            self._initial_carry() if state is None else state.scan,
            Token(q, k, v, eta, tau.expand(eta.shape)),
            self.mini_batch_size,
            shared=Norm(self.norm_weight, self.norm_bias),
        )
        y = self.post_norm(z.transpose(1, 2).flatten(2))
        if self.g_proj is not None:
            y = F.gelu(self.g_proj(x), approximate="tanh") * y
        y = self.o_proj(y)
        return (y, TTTState(new, conv)) if return_state else y

    def _queries_and_keys(
        self, x: torch.Tensor, conv: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        if not self.share_qk:
            return self.q_proj(x), self.k_proj(x), None
        both = self.qk_proj(x)
        # The two convolutions read the same inputs, so one state serves both.
        q, last = self.q_conv(both, conv)
        return q, self.k_conv(both, conv)[0], last

    def _split_heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _learning_rates(self, x: torch.Tensor) -> torch.Tensor:
        """eta ``[B, H, T]``."""
        scale = self.base_lr / self.head_dim
        return scale * torch.sigmoid(self.lr_proj(x)).transpose(1, 2)

    def _taus(self, position: torch.Tensor) -> torch.Tensor:
        """tau ``[T]``."""
        wide = torch.promote_types(self.tau_offset.dtype, torch.float32)
        count = torch.arange(1, self.mini_batch_size + 1, device=position.device, dtype=wide)
        return (1 / count + self.tau_offset).clamp_min(0)[position]

    def _initial_carry(self) -> Carry:
        weights = self.initial_weights()
        return Carry(weights, pytree.tree_map(torch.zeros_like, weights))

    def _check(self, x: torch.Tensor, state: TTTState | None) -> None:
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            got = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
            raise TypeError(f"x: expected a floating tensor [B, T, hidden_size], got {got}")
        if x.ndim != 3 or x.shape[-1] != self.hidden_size:
            raise ValueError(
                f"x: expected [B, T, hidden_size] with hidden_size = {self.hidden_size}, "
                f"got shape {tuple(x.shape)}"
            )
        if x.device != self.tau_offset.device:
            raise ValueError(
                f"x: expected the layer's device {self.tau_offset.device}, got {x.device}"
            )
        if state is None:
            return
        if not isinstance(state, TTTState):
            raise TypeError(f"state: expected a TTTState, got {type(state).__name__}")
        if (state.conv is not None) != self.share_qk:
            wanted = "with" if self.share_qk else "without"
            raise ValueError(
                f"state: expected the state of a layer {wanted} share_qk, got one where conv is "
                f"{'None' if state.conv is None else tuple(state.conv.shape)}"
            )

    def extra_repr(self) -> str:
        return (
            f"{self.hidden_size}, {self.num_heads}, mini_batch_size={self.mini_batch_size}, "
            f"base_lr={self.base_lr}"
        )


class TTTLinear(TTTLayer):
    """TTT layer whose hidden state is a linear model with residual and layer norm, ``x + LN(x W1 + b1)``.

    Per head, tokens in mini-batches of b with anchor A, G_s the gradient of ``½‖f(k_s) - v_s‖²`` at A::

        W_t = A - tau_t * sum_{s<=t} eta_s G_s        z_t = f(W_t; q_t)
        eta = base_lr * sigmoid(x·w + c) / d          tau = max(1/i + delta_i, 0), i the place from 1 to b

    q and k carry a rotary embedding of the place in the mini-batch. z goes through a layer norm over
    the full width, the optional gate ``gelu_tanh(g_proj x)``, and ``o_proj``.

    Args:
        hidden_size: width of the layer, a multiple of ``num_heads`` with an even quotient d.
        num_heads: number of heads H, each with an inner model of its own.
        mini_batch_size: tokens b whose gradients are taken at the same anchor.
        gate: multiply the output with ``gelu_tanh(g_proj x)``.
        share_qk: one projection for q and k, followed by a causal depthwise convolution for each.
        conv_kernel: width of those convolutions.
        base_lr: learning rate of the inner model.
        rope_theta: base of the rotary embedding.
        eps: of the layer norm over the full width; that of the inner norm is 1e-6.
        device, dtype: of the parameters.

    Shapes:
        x and y ``[B, T, hidden_size]``, in one floating dtype; the fast weights float32 at least.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.

    Example:
        >>> import torch, tttc
        >>> layer = tttc.nn.TTTLinear(32, num_heads=4, mini_batch_size=4)
        >>> x = torch.randn(2, 10, 32)
        >>> y, state = layer(x[:, :7], return_state=True)
        >>> more = layer(x[:, 7:], state)
        >>> torch.allclose(torch.cat([y, more], 1), layer(x), atol=1e-5), state.scan.place
        (True, 3)

    Source: arXiv 2407.04620, sections 2.1 to 2.7 and appendix.
    """

    step = staticmethod(linear_step)

    def add_fast_weights(self, options: dict[str, Any]) -> None:
        h, d = self.num_heads, self.head_dim
        self.W1 = nn.Parameter(torch.empty(h, d, d, **options))
        self.b1 = nn.Parameter(torch.empty(h, d, **options))

    def initial_weights(self) -> LinearWeights:
        return LinearWeights(self.W1, self.b1)


class TTTMLP(TTTLayer):
    """TTT layer whose hidden state is a two-layer network, ``x + LN(gelu_tanh(x W1 + b1) W2 + b2)``.

    The hidden width is ``4 * head_dim`` and ``base_lr`` is 0.1; update, arguments, shapes and errors
    are those of :class:`TTTLinear`.

    Example:
        >>> import torch, tttc
        >>> layer = tttc.nn.TTTMLP(32, num_heads=4)
        >>> layer(torch.randn(2, 10, 32)).shape, layer.W1.shape
        (torch.Size([2, 10, 32]), torch.Size([4, 8, 32]))

    Source: arXiv 2407.04620.
    """

    step = staticmethod(mlp_step)

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        mini_batch_size: int = 16,
        *,
        base_lr: float = 0.1,
        **options: Any,
    ) -> None:
        super().__init__(hidden_size, num_heads, mini_batch_size, base_lr=base_lr, **options)

    def add_fast_weights(self, options: dict[str, Any]) -> None:
        h, d = self.num_heads, self.head_dim
        self.W1 = nn.Parameter(torch.empty(h, d, 4 * d, **options))
        self.b1 = nn.Parameter(torch.empty(h, 4 * d, **options))
        self.W2 = nn.Parameter(torch.empty(h, 4 * d, d, **options))
        self.b2 = nn.Parameter(torch.empty(h, d, **options))

    def initial_weights(self) -> MLPWeights:
        return MLPWeights(self.W1, self.b1, self.W2, self.b2)
