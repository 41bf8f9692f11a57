"""Fully learnable group convolution (Wang et al., 2019): which channels form a group is learnt with the weights.

From the FLGC paper's description and public discussions of it (its authors' code could not be had): the group
matrices are one-hot in the forward pass and pass the gradient of a softmax. A public re-implementation hands that
gradient to the chosen entry only, so a channel never learns which other group would be better; here every entry gets
its own.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from bgcbench.convs.layouts import like_layout_of
from bgcbench.convs.lgc import contributions
from bgcbench.convs.masked import MaskedConv2d, gather_channels
from bgcbench.convs.plain import Sliced, Taken
from bgcbench.measure.counts import Counts, count
from bgcbench.theory.leastsquares import Fit, shrunk, solve_normal
from bgcbench.theory.partition import contiguous_partition, search_partition

MARGIN = 2.0  # by which a channel's own logit stands above the others at the start
NOISE = 0.1  # standard deviation of the logits around that; 20 of them in a row would be needed to change a group


class FullyLearnableGroupConv2d(MaskedConv2d):
    """y_i = sum over the inputs j in the group of output i of W_ij x_j, the groups being learnt.

    Masked: ``weight`` W (m, n, kh, kw), ``logits_in`` S (n, N) and ``logits_out`` T (m, N). With s = onehot(argmax S)
    and t = onehot(argmax T), y = conv(x, W * (t s^T)). Backward, onehot counts as softmax (straight-through), so every
    entry of S and T gets a gradient. Kmn + N (n + m) parameters, DKmn MACs an image (and m n N once a call for the
    mask). S and T must not decay: use :func:`bgcbench.parameter_groups`.

    Deployed: the group of each channel (buffers ``group_in`` (n,), ``group_out`` (m,)) and ``weight_packed``, the kept
    blocks in a row. Inputs are gathered by group, convolved group by group (in one grouped convolution where all groups
    have the same shape) and the outputs put back in order: K sum_g m_g n_g parameters, D times as many MACs. Groups may
    be uneven or empty. An output in a group without inputs is dead, that is constant (:meth:`dead_outputs`).

    The start is a random balanced partition, so that N need not divide n and m. He initialisation with the fan
    K n/N that an output really has. Raises ShapeError if there are more groups than channels.
    """

    variant = "flgc"
    exempt_from_decay = ("logits_in", "logits_out")
    logits_in: nn.Parameter
    logits_out: nn.Parameter
    group_in: Tensor
    group_out: Tensor
    order_in: Tensor
    order_out: Tensor
    place_out: Tensor

    def _create_weights(self, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        m, n, groups = self.out_channels, self.in_channels, self.groups
        self._blocks: list[tuple[int, int]] = [(m, n)]  # (m_g, n_g) of each group, deployed
        empty = torch.empty((m, n, *self.kernel_size), device=device, dtype=dtype)
        self.register_parameter(self.kernel_name, nn.Parameter(empty))
        if groups == 1:
            return
        partition = [contiguous_partition(c, groups)[torch.randperm(c, device="cpu")] for c in (n, m)]
        if not self.is_deployed:
            for name, own in zip(self.exempt_from_decay, partition, strict=True):
                logits = nn.functional.one_hot(own, groups).to(device=device, dtype=dtype or torch.get_default_dtype())
                self.register_parameter(name, nn.Parameter(MARGIN * logits))
            return
        for name in ("group_in", "group_out"):
            self.register_buffer(name, torch.empty(0, dtype=torch.int64, device=device))
        for name in ("order_in", "order_out", "place_out"):
            self.register_buffer(name, torch.empty(0, dtype=torch.int64, device=device), persistent=False)
        self._set_partition(partition[0], partition[1], self.kernel.device)

    def reset_parameters(self) -> None:
        """He initialisation with the fan that an output really sums over; the logits get their noise anew."""
        with torch.no_grad():
            if self.is_packed:
                for block in self._kernels():
                    if block.numel():
                        nn.init.kaiming_normal_(block, mode="fan_in", nonlinearity="relu")
            else:
                fan = self.kernel[0].numel() / self.groups
                self.kernel.normal_(0.0, (2 / fan) ** 0.5)
            if self.groups > 1 and not self.is_deployed:
                for logits in (self.logits_in, self.logits_out):
                    one_hot = torch.zeros_like(logits).scatter(1, logits.argmax(1, keepdim=True), 1.0)
                    logits.copy_(MARGIN * one_hot + NOISE * torch.randn_like(logits))
            if self.bias is not None:
                self.bias.zero_()

    def forward(self, input: Tensor) -> Tensor:
        if not self.is_packed:
            return self._convolve_masked(input)
        used = gather_channels(input, self.order_in)
        bias = None if self.bias is None else self.bias.index_select(0, self.order_out)
        if len(set(self._blocks)) == 1:
            m_g, n_g = self._blocks[0]
            kernel = like_layout_of(input, self.kernel.reshape(self.groups * m_g, n_g, *self.kernel_size))
            return gather_channels(self._convolve(used, kernel, bias, self.groups), self.place_out)
        pieces: list[Tensor | None] = []
        first_in, first_out = 0, 0
        for (m_g, n_g), block in zip(self._blocks, self._kernels(), strict=True):
            own = None if bias is None else bias[first_out : first_out + m_g]
            if m_g and n_g:
                part = like_layout_of(input, used.narrow(-3, first_in, n_g))
                pieces.append(self._convolve(part, like_layout_of(input, block), own, groups=1))
            elif m_g:
                pieces.append(None)
            first_in, first_out = first_in + n_g, first_out + m_g
        y = gather_channels(torch.cat(self._with_dead_outputs(pieces, used, bias), -3), self.place_out)
        return like_layout_of(input, y)

    def _with_dead_outputs(self, pieces: list[Tensor | None], x: Tensor, bias: Tensor | None) -> list[Tensor]:
        """``pieces`` with the outputs of groups without inputs (None) filled in: the bias, or 0."""
        known = [piece for piece in pieces if piece is not None]  # no next(): torch.compile of 2.6 does not know it
        if len(known) == len(pieces):
            return known
        if not known:  # the one way to the shape of an output that asks for no shape
            kernel = self.kernel.new_zeros(1, 1, *self.kernel_size)
            known = [self._convolve(x.narrow(-3, 0, 1), kernel, None, groups=1)]
        zeros = torch.zeros_like(known[0].narrow(-3, 0, 1))
        filled, first = [], 0
        for piece, m_g in zip(pieces, [m for m, _ in self._blocks if m], strict=True):
            own = self.kernel.new_zeros(m_g) if bias is None else bias[first : first + m_g]
            filled.append(zeros + own[:, None, None].to(zeros.dtype) if piece is None else piece)
            first += m_g
        return filled

    def dense_weight(self) -> Tensor:
        if not self.is_packed:
            return self.masked_kernel()
        dense = self.kernel.new_zeros(self.out_channels, self.in_channels, *self.kernel_size)
        for group, block in enumerate(self._kernels()):
            rows, columns = (torch.where(part == group)[0] for part in (self.group_out, self.group_in))
            dense[rows[:, None], columns] = block
        return dense

    def _plain(self, algorithm: str) -> nn.Module:
        convs, starts, first_in, first_out = [], [], 0, 0
        bias = None if self.bias is None else self.bias[self.order_out]
        for (m_g, n_g), block in zip(self._blocks, self._kernels(), strict=True):
            own = None if bias is None else bias[first_out : first_out + m_g]
            if m_g:  # outputs without inputs are constant: a kernel of zeros on any channel
                convs.append(self._stock(block if n_g else block.new_zeros(m_g, 1, *self.kernel_size), own))
                starts.append(first_in if n_g else 0)
            first_in, first_out = first_in + n_g, first_out + m_g
        if len(set(self._blocks)) == 1:
            kernel, groups = torch.cat([conv.weight for conv in convs]), self.groups
            return nn.Sequential(Taken(self.order_in), self._stock(kernel, bias, groups), Taken(self.place_out))
        return nn.Sequential(Taken(self.order_in), Sliced(convs, starts), Taken(self.place_out))

    def _scale_outputs(self, scale: Tensor) -> None:
        if not self.is_packed:
            super()._scale_outputs(scale)
            return
        rows = scale[self.order_out].split([m_g for m_g, _ in self._blocks])
        for block, own in zip(self._kernels(), rows, strict=True):  # views of the kernel
            block.mul_(own[:, None, None, None])

    def mask(self) -> Tensor:
        if self.groups == 1:
            return torch.ones_like(self.kernel[:, :, 0, 0])
        if self.is_deployed:
            return (self.group_out[:, None] == self.group_in).to(self.kernel.dtype)
        return straight_through(self.logits_out) @ straight_through(self.logits_in).T

    def assignments(self) -> tuple[Tensor, Tensor]:
        """The group of each input (n,) and of each output (m,); on a tie the first of the largest logits."""
        if self.groups == 1:
            zeros = [torch.zeros(c, dtype=torch.int64, device=self.kernel.device) for c in self.kernel.shape[1::-1]]
            return zeros[0], zeros[1]
        if self.is_deployed:
            return self.group_in, self.group_out
        return self.logits_in.argmax(1), self.logits_out.argmax(1)

    def group_sizes(self) -> list[tuple[int, int]]:
        """(m_g, n_g), outputs and inputs of each group."""
        inputs, outputs = (torch.bincount(part, minlength=self.groups).tolist() for part in self.assignments())
        return list(zip(outputs, inputs, strict=True))

    def dead_outputs(self) -> float:
        """Share of the outputs that stand in a group without inputs and are constant."""
        return sum(m_g for m_g, n_g in self.group_sizes() if not n_g) / self.out_channels

    def grouping(self) -> Tensor | None:
        """The group of each input and then of each output: (n + m,)."""
        return None if self.groups == 1 else torch.cat(self.assignments())

    def learnt(self) -> Mapping[str, float]:
        return {} if self.groups == 1 else {"dead_outputs": self.dead_outputs()}

    def counts(self, height: int, width: int) -> Counts:
        """As the groups are now; balanced ones give the formula of bgcbench.measure.counts."""
        return count(self.spec, height, width, pairs=sum(m_g * n_g for m_g, n_g in self.group_sizes()))

    def training_state(self) -> Mapping[str, Tensor]:
        if self.groups == 1:
            return {"weight": self.kernel}
        return {"weight": self.kernel, "logits_in": self.logits_in, "logits_out": self.logits_out}

    def load_projected(self, values: Mapping[str, Tensor]) -> None:
        if self.is_packed:
            group_in, group_out = (values[name].argmax(1) for name in self.exempt_from_decay)
            self._set_partition(group_in, group_out, self.kernel.device)
            weight = values["weight"]
            blocks = [weight[group_out == g][:, group_in == g].flatten() for g in range(self.groups)]
            values = {self.kernel_name: torch.cat(blocks)}
        super().load_projected(values)

    def _take_structure(self, buffers: Mapping[str, Tensor]) -> None:
        if "group_in" in buffers and "group_out" in buffers:
            # Into a layer without numbers the file's tensors themselves are assigned, where they are.
            device = buffers["group_in"].device if self.kernel.is_meta else self.kernel.device
            self._set_partition(buffers["group_in"], buffers["group_out"], device)

    def _set_partition(self, group_in: Tensor, group_out: Tensor, device: torch.device) -> None:
        """Fix the deployed structure on ``device``, with a weight of the size that goes with it, undefined in value.

        Where that size changes the weight is a new parameter: an optimiser has to be made after loading.
        """
        sizes = [torch.bincount(part.cpu(), minlength=self.groups).tolist() for part in (group_out, group_in)]
        self._blocks = list(zip(*sizes, strict=True))
        order_in = torch.argsort(group_in.cpu(), stable=True)
        order_out = torch.argsort(group_out.cpu(), stable=True)
        self.group_in, self.group_out = group_in.to(device, copy=True), group_out.to(device, copy=True)
        self.order_in, self.order_out = order_in.to(device), order_out.to(device)
        self.place_out = torch.argsort(order_out).to(device)
        length = self.kernel_size[0] * self.kernel_size[1] * sum(m_g * n_g for m_g, n_g in self._blocks)
        if self.kernel.shape != (length,):
            empty = torch.empty(length, device=self.kernel.device, dtype=self.kernel.dtype)
            setattr(self, self.kernel_name, nn.Parameter(empty, requires_grad=self.kernel.requires_grad))

    def _kernels(self) -> list[Tensor]:
        """The deployed kernels as views of the weight: (m_g, n_g, kh, kw) each."""
        taps = self.kernel_size[0] * self.kernel_size[1]
        flat = self.kernel.split([m_g * n_g * taps for m_g, n_g in self._blocks])
        return [flat[g].reshape(*block, *self.kernel_size) for g, block in enumerate(self._blocks)]

    def project(self, weight: Tensor, projection: str, fit: Fit | None) -> Mapping[str, Tensor]:
        """The kernel with balanced groups; ``weight`` stays whole, so that training can still change the groups.

        'copy', 'white': groups that keep much of the kernel's energy, the weights in them copied (which is their best
        on white input). 'least_squares': groups that keep much of the energy by the second moment, the weights in
        them then solved for. Finding the groups is a search (:func:`bgcbench.theory.partition.search_partition`),
        never worse than the contiguous groups of GC on white input.
        """
        if self.groups == 1:
            return {"weight": weight}
        if fit is not None:
            weight, outputs, inputs = least_squares(weight, self.groups, fit)
        else:
            outputs, inputs = search_partition(weight.square().flatten(2).sum(2), self.groups)
        one_hot = [nn.functional.one_hot(part, self.groups).to(weight) for part in (inputs, outputs)]
        return {"weight": weight, "logits_in": MARGIN * one_hot[0], "logits_out": MARGIN * one_hot[1]}


def straight_through(logits: Tensor) -> Tensor:
    """onehot(argmax) of each row of ``logits`` (c, N), with the gradient of softmax: (c, N).

    The first of tied entries is taken, so every row has exactly one 1 (comparing with the maximum would give several).
    """
    hard = torch.zeros_like(logits).scatter(1, logits.argmax(1, keepdim=True), 1.0)
    soft = logits.softmax(1)
    return hard + (soft - soft.detach())


def least_squares(weight: Tensor, groups: int, fit: Fit) -> tuple[Tensor, Tensor, Tensor]:
    """Groups that keep much of the energy by the moments of ``fit``, and the best weights inside them.

    W_gg = W_{g,:} C E_g^T (E_g C E_g^T)^+ , E_g selecting the inputs of group g; C and W as :func:`shrunk` has them.
    weight: (m, n, kh, kw); returns it with these weights in the groups, and the group of each output (m,) and of each
    input (n,).
    """
    weight, moment, _ = shrunk(weight, fit)
    outputs, inputs = (part.to(weight.device) for part in search_partition(contributions(weight, moment), groups))
    taps = weight[0, 0].numel()
    flat = weight.flatten(1).to(moment.dtype)
    solved = flat.clone()
    for group in range(groups):
        rows = torch.where(outputs == group)[0]
        at = torch.where((inputs == group).repeat_interleave(taps))[0]
        solved[rows[:, None], at] = solve_normal(moment[at][:, at], flat[rows] @ moment[:, at])
    return solved.reshape(weight.shape), outputs, inputs
