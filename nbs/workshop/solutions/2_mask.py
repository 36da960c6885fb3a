"Solutions of part 2, the mask"
import torch, torch.nn.functional as F

# %% Exercise 1: the last token of the prompt says the first of the answer, so the labels begin at prompt_len-1
def labels_of(ids, prompt_len):
    res = torch.full_like(ids, -100)
    res[prompt_len-1:-1] = ids[prompt_len:]
    return res

# %% Exercise 2: A, the teacher does not know its own answer; B, no ends; C, more targets than answer tokens; D, all in order
found = dict(A='unshifted', B='endless', C='prompts', D='right')

# %% Exercise 3: one step to the right, -100 in the place that becomes free
def their_labels(labels): return F.pad(labels[:,:-1], (1, 0), value=-100)

# %% Exercise 4: a position is real if it lies before the end of its row
def attention(ids, lengths): return (torch.arange(ids.shape[1]) < torch.tensor(lengths)[:,None]).long()
