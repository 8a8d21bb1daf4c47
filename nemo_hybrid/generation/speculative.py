"""Self-speculation: the MTP block drafts tokens, one pass of the backbone verifies them.

A round begins with a token in every row that is drawn but not read. The MTP block reads what the
last round verified, from the backbone's states, and then its own drafts, which it forgets again.
The backbone reads the token and the drafts, and those stay that it would have drawn itself; the
others are taken back. One more token comes of the last state that counts.

At temperature 0 the texts are those without drafts. Else a draft d stays with probability
min(1, p(d) / q(d)), and where it does not, a token is drawn from what p exceeds q by, which keeps
the distribution p (Leviathan et al. 2023, arXiv 2211.17192). Texts then are others than without
drafts, or with another number of them: they are made of other random numbers. Where the end of
thinking is forced no draft stays.

Shapes: B rows, K drafts, S = K + 1, D hidden, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_hybrid.generation.sampling import log_probabilities, pick, probabilities, uniforms
from nemo_hybrid.generation.thinking import FREE, Thinking
from nemo_hybrid.model.cache import Caches, commit
from nemo_hybrid.model.hybrid import HybridLM

_DRAFT, _ACCEPT, _REST, _USES = 0, 1, 2, 3
"""Random numbers of a place: for a draft, for accepting it, and for what comes in its stead."""


class Speculation:
    """What has to be known of each row between rounds of K drafts."""

    def __init__(
        self,
        model: HybridLM,
        rows: int,
        drafts: int,
        temperature: float,
        top_p: float,
    ) -> None:
        like = model.lm_head.weight
        self._model, self.drafts = model, drafts
        self._temperature, self._top_p = temperature, top_p
        # Verified tokens that the MTP block has not read: states before them, and how many.
        self._h_BSD = like.new_zeros(rows, drafts + 1, model.config.hidden_size)
        self._ids_BS = torch.zeros(rows, drafts + 1, dtype=torch.int64, device=like.device)
        self._counts_B = torch.ones_like(self._ids_BS[:, 0])

    def of_rows(self, rows_N: Tensor) -> Speculation:
        """The same of some rows alone."""
        some = Speculation(self._model, 0, self.drafts, self._temperature, self._top_p)
        some._h_BSD, some._ids_BS = self._h_BSD[rows_N], self._ids_BS[rows_N]
        some._counts_B = self._counts_B[rows_N]
        return some

    def begin(
        self,
        h_BD: Tensor,
        fresh_B: Tensor,
        streams_B: Tensor,
        places_B: Tensor,
        thinking: Thinking | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """First tokens [B] of the rows that begin, after the states ``h_BD``, their
        log-probabilities, and whether they are the model's choice."""
        logits_BV = self._model.logits(h_BD)
        ids_B, _ = self._draw(logits_BV, streams_B, places_B, _REST)
        chosen_B = torch.ones_like(fresh_B)
        if thinking:
            ids_B, chosen_B = thinking.decide(ids_B, fresh_B)
        self._h_BSD[:, 0] = torch.where(fresh_B[:, None], h_BD, self._h_BSD[:, 0])
        self._ids_BS[:, 0] = torch.where(fresh_B, ids_B, self._ids_BS[:, 0])
        self._counts_B = self._counts_B.masked_fill(fresh_B, 1)
        return ids_B, log_probabilities(logits_BV, ids_B), chosen_B

    def round(
        self, caches: Caches, streams_B: Tensor, places_B: Tensor, thinking: Thinking | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The next tokens [B, S] of every row, their log-probabilities, whether they are the
        model's choice, and how many of them are real: at least one. ``places_B``: of the first of
        them."""
        model, every_B = self._model, torch.arange(len(places_B), device=places_B.device)
        last_B = self._counts_B - 1
        u_BSD, after = model.read_mtp(self._h_BSD, self._ids_BS, self._counts_B, caches)
        assert caches.mtp is not None
        commit(caches.mtp, after)
        drafts_BK, q_BKV = self._draft(u_BSD[every_B, last_B], caches, streams_B, places_B)

        text_BS = torch.cat([self._ids_BS[every_B, last_B][:, None], drafts_BK], dim=1)
        h_BSD, after = model.read(text_BS, None, caches, revisable=True)
        logits_BSV = model.logits(h_BSD)
        due_BS = thinking.due(drafts_BK) if thinking else torch.full_like(text_BS, FREE)
        accepted_B, next_B = self._verify(logits_BSV, drafts_BK, q_BKV, due_BS, streams_B, places_B)
        self._counts_B = accepted_B + 1
        commit(caches, model.revise(after, self._counts_B, caches))
        self._h_BSD = h_BSD
        self._ids_BS = torch.cat([drafts_BK, next_B[:, None]], dim=1)
        self._ids_BS[every_B, accepted_B] = next_B
        if thinking:
            thinking.read(self._ids_BS, self._counts_B)
        logprobs_R = log_probabilities(logits_BSV.flatten(0, 1), self._ids_BS.flatten())
        return self._ids_BS, logprobs_R.view_as(self._ids_BS), due_BS == FREE, self._counts_B

    def _draft(
        self, u_BD: Tensor, caches: Caches, streams_B: Tensor, places_B: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Drafts [B, K], and the distributions [B, K, V] that they are drawn from. ``u_BD``: the
        MTP block's states of depth 1."""
        states, ids, q = [], [], []
        for k in range(self.drafts):
            ids_B, q_BV = self._draw(self._model.logits(u_BD), streams_B, places_B + k, _DRAFT)
            states.append(u_BD)
            ids.append(ids_B)
            q.append(q_BV)
            if k + 1 < self.drafts:  # nothing of it is committed, so all of it is read again
                chain_BkD, ids_Bk = torch.stack(states, 1), torch.stack(ids, 1)
                u_BkD, _ = self._model.read_mtp(chain_BkD, ids_Bk, None, caches)
                u_BD = u_BkD[:, -1]
        return torch.stack(ids, 1), torch.stack(q, 1)

    def _draw(
        self, logits_BV: Tensor, streams_B: Tensor, places_B: Tensor, use: int
    ) -> tuple[Tensor, Tensor]:
        """Ids [B], and what they are drawn from [B, V]; at temperature 0 that says nothing."""
        if self._temperature == 0:
            return logits_BV.argmax(-1), logits_BV
        parts_BV = probabilities(logits_BV, self._temperature, self._top_p)
        return pick(parts_BV, uniforms(streams_B, _USES * places_B + use)), parts_BV

    def _verify(
        self,
        logits_BSV: Tensor,
        drafts_BK: Tensor,
        q_BKV: Tensor,
        due_BS: Tensor,
        streams_B: Tensor,
        places_B: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """How many drafts stay in each row, and the token that follows them."""
        every_B = torch.arange(len(places_B), device=places_B.device)
        if self._temperature == 0:
            best_BS = logits_BSV.argmax(-1)
            stays_BK = drafts_BK == best_BS[:, :-1]
        else:
            p_BSV = probabilities(logits_BSV, self._temperature, self._top_p)
            places_BK = places_B[:, None] + torch.arange(self.drafts, device=places_B.device)
            numbers_BK = uniforms(streams_B[:, None], _USES * places_BK + _ACCEPT)
            stays_BK = accepts(p_BSV[:, :-1], q_BKV, drafts_BK, numbers_BK)
        stays_BK = stays_BK & (due_BS[:, :-1] == FREE)
        accepted_B = stays_BK.long().cumprod(1).sum(1)
        if self._temperature == 0:
            next_B = best_BS[every_B, accepted_B]
        else:
            q_BSV = torch.cat([q_BKV, torch.zeros_like(p_BSV[:, :1])], dim=1)
            rest_BV = remainder(p_BSV[every_B, accepted_B], q_BSV[every_B, accepted_B])
            numbers_B = uniforms(streams_B, _USES * (places_B + accepted_B) + _REST)
            next_B = pick(rest_BV, numbers_B)
        due_B = due_BS[every_B, accepted_B]
        return accepted_B, torch.where(due_B == FREE, next_B, due_B)


def accepts(p: Tensor, q: Tensor, drafts: Tensor, numbers: Tensor) -> Tensor:
    """Whether drafts [..] from q [.., V] stay where p [.., V] is wanted, with uniform numbers."""
    p_of, q_of = (t.gather(-1, drafts[..., None])[..., 0] for t in (p, q))
    return numbers * q_of < p_of


def remainder(p_BV: Tensor, q_BV: Tensor) -> Tensor:
    """What a token is drawn from in place of a rejected draft, not normalised: what p exceeds q by;
    p, where rounding leaves nothing of that."""
    rest_BV = (p_BV - q_BV).clamp(min=0)
    return torch.where(rest_BV.sum(-1, keepdim=True) > 0, rest_BV, p_BV)
