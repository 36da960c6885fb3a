"Solutions of part 3, collapse and spikes"

# %% Exercise 1: centred, then the square of the trace over the trace of the square
def directions(h):
    h = h-h.mean(0)
    C = h.T@h
    return C.trace()**2/(C@C).trace()

# %% Exercise 2: the target stays where the teacher put it
def honest(head, states): return head.requires_grad_(False)

# %% Exercise 3: the largest mean KL in the steps that stood out
def culprit(rows): return max((e for r in rows if r['verdict'] for e in r['examples']), key=lambda e: e[1])[0]
