#!/usr/bin/env python3
"""Agreement of the losses with other packages, run by peers.sh in an environment of its own.

Each peer's loss and its gradient with respect to the student's hidden states are compared with `linear_divergence`, as a mean over target tokens, on one
random batch in which two of ten positions are no targets. Columns: peer's value over ours; the factor between the gradients; what is left of the peer's
gradient when that multiple of ours is taken away, relative. A row agrees where both ratios are 1 and nothing is left.
"""
import runpy, warnings
from functools import partial
from importlib.metadata import files, version
from types import SimpleNamespace

import torch, torch.nn.functional as F

from distill_nb.divergences import jsd
from distill_nb.loss import linear_divergence

warnings.filterwarnings('ignore')
g = torch.Generator().manual_seed(0)
h,hT,W,WT = (torch.randn(*o, generator=g) for o in ((10, 16), (10, 16), (50, 16), (50, 16)))
h.requires_grad_()
y = torch.randint(50, (10,), generator=g).index_fill(0, torch.tensor([0, 7]), -100)
mask = y!=-100
def logits(): return (h@W.T)[None],(hT@WT.T)[None]

def ours(divergence, T):
    heads = [SimpleNamespace(weight=o, bias=None) for o in (W, WT)]
    return linear_divergence(h[mask], heads[0], (hT[mask], heads[1]), T, divergence=divergence).loss/mask.sum()

def torch_kl(T):
    z,zt = (o[0,mask]/T for o in logits())
    return T**2*F.kl_div(z.log_softmax(-1), zt.log_softmax(-1), reduction='batchmean', log_target=True)

def trl(beta, T):
    from trl.experimental.gkd import GKDTrainer
    return GKDTrainer.generalized_jsd_loss(*logits(), labels=y[None], beta=beta, temperature=T)

def liger(beta, T):
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss
    return LigerFusedLinearJSDLoss(0., 1., beta, temperature=T, compiled=False)(h, W, hT, WT, y)

def torchtune(name, T):
    "Its file of losses alone: the whole package asks for a torchao that matches torch, which no pair of releases need have"
    file = next(o for o in files('torchtune') if o.name=='kd_losses.py')
    z,zt = (o/T for o in logits())
    return runpy.run_path(str(file.locate()))[name]()(z, zt, y[None])

def textbrewer(name, T):
    from textbrewer import losses
    z,zt = (o[:,mask] for o in logits())
    return getattr(losses, name)(z, zt, T)

mixes = (0, 'forward_kl'),(.5, partial(jsd, beta=.5)),(.1, partial(jsd, beta=.1)),(1, 'reverse_kl')
no_T2 = 'no T^2: the gradient shrinks with T'
rows = [('torch', 'F.kl_div', 2., 'forward_kl', torch_kl, 'the control')]
for T in (1., 2.):
    rows += [('trl', f'GKD, beta {b:g}', T, d, partial(trl, b), no_T2) for b,d in mixes]
    rows += [('liger-kernel', f'fused JSD, beta {b:g}', T, d, partial(liger, b), no_T2) for b,d in mixes]
rows += [('torchtune', k, 1., d, partial(torchtune, k), why) for k,d,why in
    (('ForwardKLLoss', 'forward_kl', 'the value is a cross-entropy, more by the entropy of the teacher; no temperature'), ('ReverseKLLoss', 'reverse_kl', 'no temperature'))]
rows += [('textbrewer', 'kd_ce_loss', T, 'forward_kl', partial(textbrewer, 'kd_ce_loss'), 'the value is a cross-entropy; no T^2') for T in (1., 2.)]

def compare(divergence, T, peer):
    a,b = ours(divergence, T),peer(T)
    ga,gb = (torch.autograd.grad(o, h)[0].flatten() for o in (a, b))
    c = (ga@gb/(ga@ga)).item()
    return (b/a).item(),c,((gb-c*ga).norm()/gb.norm()).item()

def main():
    print('| package | loss | T | value ratio | gradient ratio | rest | verdict |\n|---|---|---|---|---|---|---|')
    for name,what,T,divergence,peer,why in rows:
        try: v,c,rest = compare(divergence, T, peer)
        except Exception as e:
            print(f'| {name} | {what} | {T:g} | | | | not run: {type(e).__name__}: {" ".join(str(e).split())[:100]} |')
            continue
        same = max(abs(v-1), abs(c-1), rest)<1e-4
        print(f'| {name} {version(name)} | {what} | {T:g} | {v:.4f} | {c:.4f} | {rest:.0e} | {"agrees" if same else why} |')

if __name__=='__main__': main()
