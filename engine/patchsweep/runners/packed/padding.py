"""Padding: the tables of packed tokens, for a block of one of a few sizes."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
from patchsweep_kernels.attention import Rows
from torch import Tensor

from patchsweep.models.moves import Moves

LEAST_TOKENS = 256


def size_of(n_tokens: int) -> int:
    """Return the padded size of a block: 256, 384, 512, 768, .., a third of it wasted at most."""
    power = 1 << max(0, n_tokens - 1).bit_length()
    return max(LEAST_TOKENS, power * 3 // 4 if n_tokens <= power * 3 // 4 else power)


@dataclass(frozen=True, eq=False)
class Padded:
    """The tables of packed tokens, followed by tokens that nobody reads.

    Each of those is a row of its own, at position 0 of the first pair, and sees itself alone.
    """

    token_pair: Tensor  # [token] row of the base run
    token_pos: Tensor  # [token]
    rows: Rows
    tokens: Tensor  # [2, token] `Rows.token_table`
    blocks: dict[int, Tensor]  # size -> `Rows.block_table`, followed by blocks without tokens

    @classmethod
    def of(
        cls,
        token_pair: Tensor,
        token_pos: Tensor,
        rows: Rows,
        n_pairs: int,
        sizes: Collection[int],
    ) -> Padded | None:
        """Return the tables on the CPU; None if the pairs of `rows` are not in order.

        `n_pairs`: of the base runs. `sizes`: of the attention kernel's blocks.
        """
        if bool((rows.pair[1:] < rows.pair[:-1]).any()):
            return None
        n, size = rows.n_tokens, size_of(rows.n_tokens)
        zeros = token_pair.new_zeros(size - n)
        padded = Rows(
            torch.cat((rows.offsets, torch.arange(n + 1, size + 1, device="cpu"))),
            torch.cat((rows.pair, rows.pair[-1:].expand(size - n))),
            torch.cat((rows.start, zeros)),
        )
        blocks = {}
        for of_block in sizes:
            table = padded.block_table(of_block, _CPU)
            full = table.new_zeros(-(-size // of_block) + n_pairs, 6)
            full[: len(table)] = table
            blocks[of_block] = full
        return cls(
            torch.cat((token_pair, zeros)),
            torch.cat((token_pos, zeros)),
            padded,
            padded.token_table(_CPU),
            blocks,
        )

    def tensors(self) -> list[Tensor]:
        """Return the tables that go to a device."""
        return [self.token_pair, self.token_pos, self.tokens, *self.blocks.values()]

    def there(self, moves: Moves) -> Padded:
        """Return these tables where `moves` took them."""
        return replace(
            self,
            token_pair=moves[self.token_pair],
            token_pos=moves[self.token_pos],
            tokens=moves[self.tokens],
            blocks={size: moves[table] for size, table in self.blocks.items()},
        )


_CPU = torch.device("cpu")
