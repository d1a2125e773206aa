"""Run the loops of hard-negative mining, compiled by numba at their first call.

Imported only for mining.

Legend: N captions, V terms, E entries (a term in a caption), K negatives kept for a caption. `rows`
are (starts, terms, weights, ..) of a TermIndex, `lists` its (list_starts, captions, impacts).
"""

from collections.abc import Callable

import numba
import numpy as np

BUCKETS = 1024
STRETCH = 65536  # captions whose sums fit into the cache at a time
# how far the float32 sum of a caption may be from its similarity in double precision
ROUNDING = 1e-5


def _compiled(function: Callable) -> Callable:
    """Compile a function to run without the GIL; cached on disk if a cache folder is writable."""
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:
        return numba.njit(nogil=True)(function)


@_compiled
def count_terms(flat, lengths, terms, counts):
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
def add_document_frequencies(terms, frequencies):
    """Add 1 to `frequencies` [V] for each entry of `terms` [E]."""
    for term in terms:
        frequencies[term] += 1


@_compiled
def norms(starts, terms, counts, idf):
    """Compute the norm of each TF-IDF row before it is normalised, float64 [N]."""
    result = np.zeros(len(starts) - 1)
    for caption in range(len(result)):
        total = 0.0
        for e in range(starts[caption], starts[caption + 1]):
            total += (counts[e] * idf[terms[e]]) ** 2
        result[caption] = np.sqrt(total)

    return result


@_compiled
def permuted_rows(starts, terms, counts, idf, lengths, order, rank, new_starts, new_terms, weights):
    """Write the rows in the given `order` [N], with terms renumbered by `rank` [V] and sorted, and
    weights divided by `lengths` [N].
    """
    end = 0

    for position in range(len(order)):
        caption = order[position]
        first = starts[caption]
        last = starts[caption + 1]
        sequence = np.argsort(rank[terms[first:last]])

        for step in sequence:
            e = first + step
            new_terms[end] = rank[terms[e]]
            weights[end] = counts[e] * idf[terms[e]] / lengths[caption]
            end += 1

        new_starts[position + 1] = end


@_compiled
def invert(starts, terms, weights, list_starts, captions, impacts):
    """Invert rows: fill `captions` and `impacts` with each term's captions, in order, and their
    weights; fill list_starts [V + 1] too.
    """
    for term in terms:
        list_starts[term + 1] += 1
    for term in range(len(list_starts) - 1):
        list_starts[term + 1] += list_starts[term]

    free = list_starts[:-1].copy()
    for caption in range(len(starts) - 1):
        for e in range(starts[caption], starts[caption + 1]):
            place = free[terms[e]]
            captions[place] = caption
            impacts[place] = weights[e]
            free[terms[e]] += 1


@_compiled
def similarity(starts, terms, weights, query, other):
    """Compute the cosine of two rows in double precision, summed in the order of terms."""
    total = 0.0
    q = starts[query]
    o = starts[other]

    while q < starts[query + 1] and o < starts[other + 1]:
        if terms[q] == terms[o]:
            total += np.float64(weights[q]) * np.float64(weights[o])
            q += 1
            o += 1
        elif terms[q] < terms[o]:
            q += 1
        else:
            o += 1

    return total


@_compiled
def similarities(starts, terms, weights, queries, others):
    """Compute the `similarity` of pairs [P], float64; -1 for pairs whose other is -1."""
    result = np.full(len(queries), -1.0)
    for pair in range(len(queries)):
        if others[pair] >= 0:
            result[pair] = similarity(starts, terms, weights, queries[pair], others[pair])

    return result


@_compiled
def choose_lists(query, budget, rest, rows, lists, places, ends):
    """Choose which part of each term's list to read, rarest term first, until `budget` entries are
    spent or the norm of the rest of the query's row is at most `rest`.

    Fills `places` and `ends`; returns the number of lists and the norm of the part of the row whose
    lists are not read in full, the most that any sum can miss.
    """
    starts = rows[0]
    terms = rows[1]
    weights = rows[2]
    missing = 0.0
    for e in range(starts[query], starts[query + 1]):
        missing += np.float64(weights[e]) ** 2

    number = 0
    left = budget

    for e in range(starts[query + 1] - 1, starts[query] - 1, -1):
        if left <= 0 or missing <= rest * rest:
            break

        begin = lists[0][terms[e]]
        end = lists[0][terms[e] + 1]
        take = min(end - begin, left)
        places[number] = begin
        ends[number] = begin + take
        number = number + 1
        left = left - take
        if take == end - begin:
            missing -= np.float64(weights[e]) ** 2

    return number, np.sqrt(max(missing, 0.0))


@_compiled
def add_lists(query, number, scale, rows, lists, scratch):
    """Sum the products of weights that captions share with the query, over the chosen lists; return
    how many captions have a sum in a bucket.

    Captions are processed in stretches whose sums stay in the processor's cache. The scratch
    receives the captions and their sums, one stretch after another, and the histogram the number of
    sums in each bucket.
    """
    weights = rows[2]
    list_captions = lists[1]
    impacts = lists[2]
    sums, touched, captions, partial, histogram, places, ends = scratch[:7]
    last = rows[0][query + 1] - 1
    histogram[:] = 0
    total = 0

    for base in range(0, len(rows[0]) - 1, len(sums)):
        stop = base + len(sums)
        count = 0

        for i in range(number):
            place = places[i]
            end = ends[i]
            weight = weights[last - i]

            while place < end and list_captions[place] < stop:
                local = list_captions[place] - base
                before = sums[local]
                touched[count] = local
                count += before == 0.0
                sums[local] = before + weight * impacts[place]
                place += 1

            places[i] = place

        for i in range(count):
            local = touched[i]
            value = sums[local]
            sums[local] = 0.0
            bucket = int(value * scale)

            if bucket < len(histogram):
                histogram[bucket] += 1
                captions[total] = base + local
                partial[total] = value
                total += 1

    return total


@_compiled
def keep(score, caption, scores, kept, count):
    """Insert a caption into the best K so far, by score, then by lower number; return the new
    count.
    """
    size = len(kept)
    if count == size and (
        score < scores[size - 1] or (score == scores[size - 1] and caption > kept[size - 1])
    ):
        return count

    place = min(count, size - 1)
    while place > 0 and (
        scores[place - 1] < score or (scores[place - 1] == score and kept[place - 1] > caption)
    ):
        scores[place] = scores[place - 1]
        kept[place] = kept[place - 1]
        place -= 1

    scores[place] = score
    kept[place] = caption

    return min(count + 1, size)


@_compiled
def next_buckets(upper, wanted, histogram):
    """Return the lowest bucket of the range below `upper` that holds at least `wanted` sums, or all
    the rest, and how many sums it holds.
    """
    lower = upper
    batch = 0
    while lower > 0 and batch < wanted:
        lower -= 1
        batch += histogram[lower]

    return lower, batch


@_compiled
def score_exactly(query, total, lower, upper, scale, below, rows, scratch, scores, kept, found):
    """Score the captions whose sums are in the buckets lower .. upper - 1 in double precision, and
    keep those that are allowed; return the number kept.
    """
    starts, terms, weights, images, texts, original = rows
    captions = scratch[2]
    partial = scratch[3]
    dense = scratch[7]

    for i in range(total):
        bucket = int(partial[i] * scale)
        if bucket < lower or bucket >= upper:
            continue

        other = captions[i]
        score = 0.0
        for e in range(starts[other], starts[other + 1]):
            score += dense[terms[e]] * np.float64(weights[e])
        if score >= below or (found == len(kept) and score < scores[found - 1]):
            continue
        if images[other] != images[query] and texts[other] != texts[query]:
            found = keep(score, original[other], scores, kept, found)

    return found


@_compiled
def search_one(query, budget, rest, limit, certain, below, rows, lists, scratch, scores, kept):
    """Search the best K of one caption, from at most `budget` entries of its lists; return how many
    were found, or -1 if certainty needs more entries.
    """
    histogram = scratch[4]
    scale = (len(histogram) - 1) / (below + ROUNDING)
    number, missing = choose_lists(query, budget, rest, rows, lists, scratch[5], scratch[6])
    total = add_lists(query, number, scale, rows, lists, scratch)
    found = 0
    seen = 0
    upper = len(histogram)

    while upper > 0:
        lower, batch = next_buckets(upper, max(limit - seen, seen, 4 * len(kept)), histogram)
        found = score_exactly(
            query, total, lower, upper, scale, below, rows, scratch, scores, kept, found
        )
        seen = seen + batch
        upper = lower

        if found == len(kept):
            if certain and scores[found - 1] > upper / scale + missing + ROUNDING:
                return found
            if not certain and seen >= limit:
                return found

    return found if missing == 0.0 or not certain else -1


@_compiled
def search(queries, budget, rest, limit, certain, below, rows, lists, scratch, scores, kept):
    """Fill `kept` [Q, K] with original caption numbers, best first, and `scores` [Q, K].

    `certain`: continue until nothing left can be better; otherwise stop once `limit` captions are
    scored. A search that finds fewer than K is repeated with eight times the budget, until all
    lists are read in full.
    """
    starts = rows[0]
    terms = rows[1]
    weights = rows[2]
    dense = scratch[7]

    for row in range(len(queries)):
        query = queries[row]
        entries = 0
        for e in range(starts[query], starts[query + 1]):
            dense[terms[e]] = weights[e]
            entries += lists[0][terms[e] + 1] - lists[0][terms[e]]

        spend = budget
        leave = rest

        while entries > 0:
            found = search_one(
                query,
                spend,
                leave,
                limit,
                certain,
                below,
                rows,
                lists,
                scratch,
                scores[row],
                kept[row],
            )
            if found == kept.shape[1] or (spend >= entries and leave == 0.0):
                break

            spend = entries if spend >= entries // 8 else spend * 8
            leave = 0.0
            kept[row] = -1
            scores[row] = -1.0

        for e in range(starts[query], starts[query + 1]):
            dense[terms[e]] = 0.0
