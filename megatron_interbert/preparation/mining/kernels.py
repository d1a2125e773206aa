"""Run the loops of hard-negative mining, compiled by numba at their first call.

Imported only for mining.

Legend: N captions, R rows (captions with the same terms share one), V terms, E entries (a term in a
row), K negatives kept for a caption. A row's terms are sorted, frequent terms first; terms are
numbered by falling frequency.
"""

from collections.abc import Callable

import numba
import numpy as np

Array = np.ndarray
Arrays = tuple[np.ndarray, ...]

# how far a bound in float32 may be below the similarity in double precision, for each term
ROUNDING = 1e-6
LEVELS = 64  # of the norms by which lists are sorted
STRETCH = 128  # entries of a list that are read before their rows are scored
SKETCHED = 8  # terms before an entry of which the index knows roughly what they are
OWN_CODES = 128  # the most frequent terms have a code each, all others share the rest of 256


def _compiled(function: Callable) -> Callable:
    """Compile a function to run without the GIL; cached on disk if a cache folder is writable."""
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:
        return numba.njit(nogil=True)(function)


@_compiled
def count_terms(flat: Array, lengths: Array, terms: Array, counts: Array) -> Array:
    """Fill `terms` and `counts` with the distinct terms of each caption, sorted, from all terms end
    to end [T]; return how many are distinct in each caption [N].
    """
    distinct = np.empty(len(lengths), np.int32)
    start = end = 0

    for caption in range(len(lengths)):
        row = np.sort(flat[start : start + lengths[caption]])
        start += lengths[caption]
        first = end

        for term in row:
            if end > first and terms[end - 1] == term:
                counts[end - 1] = min(counts[end - 1] + 1, 65535)
            else:
                terms[end] = term
                counts[end] = 1
                end += 1

        distinct[caption] = end - first

    return distinct


@_compiled
def add_document_frequencies(terms: Array, frequencies: Array) -> None:
    """Add 1 to `frequencies` [V] for each entry of `terms` [E]."""
    for term in terms:
        frequencies[term] += 1


@_compiled
def row_keys(starts: Array, terms: Array, counts: Array, rank: Array) -> Array:
    """Compute a number for each caption [N] that is equal for the same terms and counts, and
    ascends with the rank of the rarest term.
    """
    result = np.zeros(len(starts) - 1, np.uint64)
    for caption in range(len(result)):
        total = np.uint64(14695981039346656037)
        rarest = 0
        for e in range(starts[caption], starts[caption + 1]):
            rarest = max(rarest, rank[terms[e]])
            total = (total ^ np.uint64(terms[e])) * np.uint64(1099511628211)
            total = (total ^ np.uint64(counts[e])) * np.uint64(1099511628211)
            total ^= total >> np.uint64(29)
        result[caption] = (np.uint64(rarest) << np.uint64(32)) | (total >> np.uint64(32))

    return result


@_compiled
def same_row(starts: Array, terms: Array, counts: Array, caption: int, other: int) -> bool:
    """Tell whether two captions have the same terms and counts."""
    size = starts[caption + 1] - starts[caption]
    if starts[other + 1] - starts[other] != size:
        return False

    for i in range(size):
        e = starts[caption] + i
        o = starts[other] + i
        if terms[e] != terms[o] or counts[e] != counts[o]:
            return False

    return True


@_compiled
def number_rows(starts: Array, terms: Array, counts: Array, order: Array, row_of: Array) -> int:
    """Fill `row_of` [N] with the numbers of distinct rows, in the given order of captions, in which
    equal ones are neighbours; return how many there are.
    """
    rows = 0
    for i in range(len(order)):
        if i == 0 or not same_row(starts, terms, counts, order[i - 1], order[i]):
            rows += 1
        row_of[order[i]] = rows - 1

    return rows


@_compiled
def write_rows(
    starts: Array,
    terms: Array,
    counts: Array,
    idf: Array,
    rank: Array,
    examples: Array,
    row_starts: Array,
    entries: Array,
) -> None:
    """Write the rows of the example captions [R], with terms renumbered by `rank` [V] and sorted,
    and weights of length 1; each is followed by an entry with the term V.
    """
    end = 0

    for row in range(len(examples)):
        row_starts[row] = end
        first = starts[examples[row]]
        last = starts[examples[row] + 1]
        length = 0.0
        for e in range(first, last):
            length += (counts[e] * idf[terms[e]]) ** 2

        for step in np.argsort(rank[terms[first:last]]):
            e = first + step
            entries[end].term = rank[terms[e]]
            entries[end].weight = counts[e] * idf[terms[e]] / np.sqrt(length)
            end += 1

        entries[end].term = len(idf)
        entries[end].weight = 0.0
        end += 1

    row_starts[len(examples)] = end


@_compiled
def code_of(term: int) -> int:
    """Return the code that stands for a term in a sketch, 0 to 255."""
    if term < OWN_CODES:
        return term
    # mixed, as neighbours in frequency should not share a code
    mixed = (np.uint64(term) * np.uint64(2654435761)) >> np.uint64(12)
    return OWN_CODES + np.int64(mixed % np.uint64(256 - OWN_CODES))


@_compiled
def describe(
    starts: Array,
    entries: Array,
    terms: Array,
    places: Array,
    impacts: Array,
    norms: Array,
    codes: Array,
    amounts: Array,
    tails: Array,
) -> None:
    """Fill for each term of each row: the term, where its row starts, its weight, the norm of the
    row up to it, and a sketch of the SKETCHED terms before it: their codes, their weights in 255ths
    rounded up, and the norm of what is before them.
    """
    number = 0

    for row in range(len(starts) - 1):
        square = 0.0
        tail = 0.0
        for e in range(starts[row], starts[row + 1] - 1):
            square += np.float64(entries[e].weight) ** 2
            terms[number] = entries[e].term
            places[number] = starts[row]
            impacts[number] = entries[e].weight
            norms[number] = np.sqrt(square)

            for i in range(min(SKETCHED, e - starts[row])):
                codes[number, i] = code_of(entries[e - 1 - i].term)
                amounts[number, i] = min(np.ceil(entries[e - 1 - i].weight * 255), 255)

            if e - starts[row] > SKETCHED:
                tail += np.float64(entries[e - 1 - SKETCHED].weight) ** 2
            tails[number] = np.sqrt(tail)
            number += 1


@_compiled
def similarity(entries: Array, place: int, other: int, end: int) -> float:
    """Compute the cosine of the rows that start at two places, in double precision, summed in the
    order of terms; `end` is the term that ends a row.
    """
    total = 0.0

    while entries[place].term != end and entries[other].term != end:
        difference = entries[place].term - entries[other].term
        if difference == 0:
            total += np.float64(entries[place].weight) * np.float64(entries[other].weight)
        place += difference <= 0
        other += difference >= 0

    return total


@_compiled
def similarities(starts: Array, entries: Array, end: int, rows: Array, others: Array) -> Array:
    """Compute the `similarity` of pairs of rows [P], float64; -1 for pairs whose other is -1."""
    result = np.full(len(rows), -1.0)
    for pair in range(len(rows)):
        if others[pair] >= 0:
            result[pair] = similarity(entries, starts[rows[pair]], starts[others[pair]], end)

    return result


@_compiled
def keep(score: float, caption: int, scores: Array, kept: Array, count: int) -> int:
    """Insert a caption that is not there yet into the best K so far, by score, then by lower
    number; return the new count.
    """
    size = len(kept)
    place = count
    while place > 0 and (
        scores[place - 1] < score or (scores[place - 1] == score and kept[place - 1] > caption)
    ):
        place -= 1

    if place == size or (place > 0 and kept[place - 1] == caption):
        return count

    for i in range(min(count, size - 1), place, -1):
        scores[i] = scores[i - 1]
        kept[i] = kept[i - 1]

    scores[place] = score
    kept[place] = caption

    return min(count + 1, size)


@_compiled
def possible_rows(
    begin: int,
    end: int,
    weight: float,
    rest: float,
    least: float,
    table: Array,
    lists: Arrays,
    found: Array,
) -> int:
    """Find where the rows start of the entries begin .. end - 1 of a list whose similarity may be
    `least` or more if they share no rarer term with the query; return how many were written to
    `found`.

    The similarity is at most weight x impact, and of the terms before: the sketch's amounts times
    the query's weights by code (`table` [256]), and the product of the norms of the `rest` of the
    query and of the row's tail.
    """
    places, impacts, _, codes, amounts, tails = lists[1:]
    number = 0

    for p in range(begin, end):
        most = weight * impacts[p] + rest * tails[p]
        for i in range(SKETCHED):
            most += table[codes[p, i]] * np.float32(amounts[p, i])

        found[number] = places[p]
        number += most >= least

    return number


@_compiled
def score_rows(found: Array, number: int, entries: Array, dense: Array, scores: Array) -> None:
    """Compute the cosine of the query (`dense` [V + 1]) and of the rows that start at the first
    `number` places of `found`, in double precision, summed in the order of terms.

    Rows lie anywhere in memory: a loop over their first entries fetches many of them at a time,
    where the loop over whole rows would wait for each.
    """
    end = len(dense) - 1
    for i in range(number):
        first = entries[found[i]]
        scores[i] = dense[first.term] * np.float64(first.weight)

    for i in range(number):
        total = scores[i]
        e = found[i] + 1
        while entries[e].term != end:
            total += dense[entries[e].term] * np.float64(entries[e].weight)
            e += 1
        scores[i] = total


@_compiled
def keep_captions(
    row: int, score: float, image: int, captions: Arrays, scores: Array, kept: Array, count: int
) -> int:
    """Insert the captions of a row that are not of the query's image; return the new count."""
    holder_starts, holders, images = captions

    for i in range(holder_starts[row], holder_starts[row + 1]):
        caption = holders[i]
        last = len(kept) - 1
        if count > last and (
            scores[last] > score or (scores[last] == score and kept[last] < caption)
        ):
            break
        if images[caption] != image:
            count = keep(score, caption, scores, kept, count)

    return count


@_compiled
def search_row(
    query: int,
    image: int,
    below: float,
    rows: Arrays,
    lists: Arrays,
    captions: Arrays,
    dense: Array,
    scores: Array,
    kept: Array,
) -> None:
    """Find the best K captions for a row and an image, exactly.

    Lists are read from the query's rarest term on. The entries of a list are sorted by falling norm
    of the row up to the term, so that reading ends where the query's norm up to the term times the
    row's is less than the K-th best similarity so far: rows that come later have it only if they
    share a rarer term, whose list was read.
    """
    starts, entries = rows
    list_starts = lists[0]
    first = starts[query]
    size = starts[query + 1] - 1 - first
    weights = entries[first : first + size]["weight"]
    norms = np.sqrt(np.cumsum(weights.astype(np.float64) ** 2)).astype(np.float32)
    table = np.zeros(256, np.float32)
    for i in range(size):
        code = code_of(entries[first + i].term)
        table[code] = max(table[code], weights[i] / np.float32(255))

    slack = ROUNDING * (size + SKETCHED)
    found = np.empty(STRETCH + 1, np.int64)
    cosines = np.empty(STRETCH)
    count = 0
    worst = 0.0

    for i in range(size - 1, -1, -1):
        term = entries[first + i].term

        for begin in range(list_starts[term], list_starts[term + 1], STRETCH):
            least = np.float32(worst - slack)
            if norms[i] * (lists[3][begin] + 1 / LEVELS) < least:
                break

            end = min(begin + STRETCH, list_starts[term + 1])
            number = possible_rows(
                begin, end, weights[i], norms[max(i - 1, 0)], least, table, lists, found
            )
            score_rows(found, number, entries, dense, cosines)

            for j in range(number):
                if worst <= cosines[j] < below and found[j] != first:
                    row = np.searchsorted(starts, found[j])
                    count = keep_captions(row, cosines[j], image, captions, scores, kept, count)
                    worst = scores[-1] if count == len(kept) else 0.0


@_compiled
def search(
    queries: Array,
    below: float,
    row_of: Array,
    rows: Arrays,
    lists: Arrays,
    captions: Arrays,
    scores: Array,
    kept: Array,
) -> None:
    """Fill `kept` [Q, K] with the numbers of captions, best first, and `scores` [Q, K].

    `queries` [Q] are captions, row_of [N] their rows, `rows` (starts, entries), `lists`
    (list_starts [V + 1], then of each entry what `describe` fills), `captions`
    (holder_starts [R + 1], holders [N], images [N]).
    """
    starts, entries = rows
    dense = np.zeros(len(lists[0]))

    for i in range(len(queries)):
        row = row_of[queries[i]]
        for e in range(starts[row], starts[row + 1]):
            dense[entries[e].term] = entries[e].weight

        search_row(
            row, captions[2][queries[i]], below, rows, lists, captions, dense, scores[i], kept[i]
        )
        for e in range(starts[row], starts[row + 1]):
            dense[entries[e].term] = 0.0
