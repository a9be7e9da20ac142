"""Expert dispatch over ranks: token rows travel to the ranks of their experts and come back as weighted sums.

It is the `dispatch` of an MoE of which shard.py has spread the experts over a group. A token is sent once to each rank
that has any of its experts, however many, and each rank adds up what its experts make of it.

Shapes: N tokens of this rank, K choices a token, D model width, P ranks of the group, E experts, L = E / P of them on a
rank, S rows sent, M rows received.   Next: ../moe.py, parallel.py.
"""

import torch
import torch.distributed as dist

from kernels.experts import SumRows, TakeRows


class ExpertParallel:
    """Three steps, between which others compute: send, receive and collect.

    A token is sent once to each rank that has any of its experts, however many, with the choices and weights that
    concern that rank; of K = 8 choices over 8 ranks that is 5.25 rows instead of 8. One host sync a layer: the sizes.
    """

    def __init__(self, group, n_experts):
        self.group, self.ranks = group, dist.get_world_size(group)
        self.here = n_experts // self.ranks

    def send(self, x_ND, weights_NK, experts_NK):
        """Start sending; returns what receive and collect need."""
        N, K = experts_NK.shape
        rank_NK = experts_NK // self.here
        sent_PN = torch.zeros(self.ranks, N, dtype=torch.bool, device=x_ND.device).scatter_(0, rank_NK.T, True)
        choices_P = torch.zeros(self.ranks, dtype=torch.int64, device=x_ND.device)
        choices_P.scatter_add_(0, rank_NK.flatten(), torch.ones_like(rank_NK.flatten()))
        out_P2 = torch.stack((sent_PN.sum(1), choices_P), dim=1)
        sizes = self.sizes(out_P2)
        send_splits, receive_splits = ([rows for rows, _ in side] for side in sizes)
        n_choices = sum(choices for _, choices in sizes[1])

        flat_S = sent_PN.flatten().to(torch.uint8).argsort(descending=True, stable=True)[:sum(send_splits)]
        token_S, target_S = flat_S % N, flat_S // N
        there_SK = rank_NK[token_S] == target_S.unsqueeze(1)
        local_SK = torch.where(there_SK, experts_NK[token_S] % self.here, self.here)
        about_S2K = torch.cat((weights_NK.float()[token_S], local_SK.float()), dim=1)  # small whole numbers are exact

        # Where the rows of each token are, of which there are at most min(P, K): an absent one lies beyond the end.
        position_PN = (sent_PN.flatten().cumsum(0) - 1).view_as(sent_PN)
        slots = min(self.ranks, K)
        slot_PN = (sent_PN.cumsum(0) - 1).masked_fill(~sent_PN, slots)
        from_NJ = torch.full((N, slots + 1), len(token_S), device=x_ND.device)
        from_NJ = from_NJ.scatter_(1, slot_PN.T, position_PN.T)[:, :slots]

        rows = _Trip(self.group, send_splits, receive_splits)
        about = _Trip(self.group, send_splits, receive_splits)
        x_MD = _Depart.apply(TakeRows.apply(x_ND, token_S, from_NJ), rows)
        about_M2K = _Depart.apply(about_S2K, about)
        return x_MD, about_M2K, rows, about, n_choices, token_S, from_NJ

    def sizes(self, out_P2):
        """[[[rows, choices] for every rank that they go to], [... that they come from]], with the host sync."""
        in_P2 = torch.empty_like(out_P2)
        dist.all_to_all_single(in_P2, out_P2, group=self.group)
        return torch.stack((out_P2, in_P2)).tolist()

    def receive(self, handle):
        """(rows, weights, local choices, number of choices) for Experts. A choice of another rank reads as expert L,
        which is none."""
        x_MD, about_M2K, rows, about, n_choices, _, _ = handle
        x_MD, about_M2K = _Arrive.apply(x_MD, rows), _Arrive.apply(about_M2K, about)
        weights_MK, local_MK = about_M2K.chunk(2, dim=1)
        return x_MD, weights_MK, local_MK.detach().long(), n_choices

    def collect(self, y_MD, handle):
        """Send the rows' results home and add them up per token, in fp32."""
        _, _, rows, _, _, token_S, from_NJ = handle
        home = _Trip(self.group, rows.receive_splits, rows.send_splits)
        return SumRows.apply(_Arrive.apply(_Depart.apply(y_MD, home), home), token_S, from_NJ)


class _Trip:
    """One exchange of rows over a group: how many go where, and the work that is under way."""

    def __init__(self, group, send_splits, receive_splits):
        self.group, self.send_splits, self.receive_splits = group, send_splits, receive_splits

    def go(self, x_SD, back=False):
        send, receive = self.send_splits, self.receive_splits
        if back:
            send, receive = receive, send
        x_SD = x_SD.contiguous()
        out = x_SD.new_empty(sum(receive), x_SD.shape[1])
        self.work = dist.all_to_all_single(out, x_SD, receive, send, group=self.group, async_op=True)
        self.out, self.keep = out, x_SD  # until the work is done
        return out

    def wait(self):
        self.work.wait()
        # A work holds its tensors: one that a recomputation leaves here would hold all of its graph, itself too.
        out, self.out, self.keep, self.work = self.out, None, None, None
        return out


class _Depart(torch.autograd.Function):
    """Start a trip. What is computed before _Arrive overlaps with it, in the backward too: there _Arrive starts the way
    back and _Depart waits for it, and autograd runs in between what the forward ran in between."""

    @staticmethod
    def forward(ctx, x, trip):
        ctx.trip = trip
        return trip.go(x)

    @staticmethod
    def backward(ctx, grad):
        return ctx.trip.wait(), None


class _Arrive(torch.autograd.Function):
    """Wait for a trip."""

    @staticmethod
    def forward(ctx, x, trip):
        ctx.trip = trip
        trip.wait()
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        ctx.trip.go(grad, back=True)
        return grad, None  # only its shape counts: _Depart returns what comes back
