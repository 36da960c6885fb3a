#!/usr/bin/env python3
"""Agreement of the losses with other packages: run by peers.sh, in an environment of its own.

usage: peers.py [--no-write]

Each peer's loss and its gradient with respect to the student's hidden states are compared with ours, as a mean over target tokens, on one random batch
in which two of ten positions are no targets. A peer that differs must do so by a known rule: the loss is made again by that rule, from our functions,
and has to agree with the peer. Prints a table, writes it as the section "Agreement" of RESULTS.md beside this file, and exits 1 where a peer differs in
any other way.
"""
import argparse, runpy, sys, warnings
from functools import partial
from importlib.metadata import PackageNotFoundError, files, version
from pathlib import Path
from types import SimpleNamespace

import torch, torch.nn.functional as F

from distill_nb.divergences import Sampled, TopK, jsd, top_k
from distill_nb.loss import forward_kl, linear_divergence
from loss import machine, write

warnings.filterwarnings('ignore')
N,d,V,K = 10,16,50,8
g = torch.Generator().manual_seed(0)
h,hT,W,WT,extra = (torch.randn(*o, generator=g, dtype=torch.float64) for o in ((N, d), (N, d), (V, d), (V, d), (3, d)))
h.requires_grad_()
y = torch.randint(V, (N,), generator=g).index_fill(0, torch.tensor([0, 7]), -100)
m = y!=-100
lots = Sampled(torch.randint(V, (8, 6), generator=g), torch.rand(8, 6, generator=g, dtype=torch.float64), V)

# Ours, and the same by the rule of another

def logits(): return h@W.T,hT@WT.T
def bare(weight): return SimpleNamespace(weight=weight, bias=None)

def ours(T, f='forward_kl', target=None, **kw):
    "Mean over targets; from the teacher's head unless a target is given"
    return linear_divergence(h[m], bare(W), target or (hT[m],bare(WT)), T, y[m], divergence=f, **kw).loss/m.sum()

def bucket(T, by_student=False):
    "The bucket over the teacher's best ids, or over the student's"
    z,zt = (o[m].detach() for o in logits())
    if not by_student: return ours(T, target=top_k(zt, K, T))
    ids = z.topk(K, -1).indices
    return ours(T, target=TopK(ids, zt.gather(-1, ids), (zt.scatter(-1, ids, -torch.inf)/T).logsumexp(-1), T, V))

def renormalised(T):
    "KL among the teacher's best ids alone"
    z,zt = (o[m] for o in logits())
    ids = zt.topk(K, -1).indices
    return forward_kl(z.gather(-1, ids), zt.gather(-1, ids), T).mean()

def entropy(T):
    "Of the teacher"
    log_t = (logits()[1][m]/T).log_softmax(-1)
    return -(log_t.exp()*log_t).sum(-1).mean()

def symmetric(T): return .5*ours(T) + .5*ours(T, 'reverse_kl')
def more_ids(T): return ours(T, target=(hT[m],bare(torch.cat([WT, extra]))))
def zero_padded(T): return T**2*forward_kl(F.pad(logits()[0][m], (0,3)), (hT@torch.cat([WT, extra]).T)[m], T).mean()

no_T2 = 'no T^2'
def smaller(f, T): return no_T2, lambda: f(T)/T**2
def plus_entropy(T, f=ours, share=1.):
    "What a cross-entropy is more than a KL"
    return f"{'half ' if share==.5 else ''}a cross-entropy, more by {'half ' if share==.5 else ''}the teacher's entropy" + '; no T^2'*(T!=1), lambda: f(T)/T**2 + share*entropy(T)

# Theirs

def torch_kl(T, reverse=False):
    a,b = ((o[m]/T).log_softmax(-1) for o in logits())
    if reverse: a,b = b,a
    return T**2*F.kl_div(a, b, reduction='batchmean', log_target=True)

def torch_jsd(T, beta):
    p,t = ((o[m]/T).softmax(-1) for o in logits())
    log_m = (beta*t + (1-beta)*p).log()
    return T**2*(beta*F.kl_div(log_m, t, reduction='batchmean') + (1-beta)*F.kl_div(log_m, p, reduction='batchmean'))

def torch_bucket(T):
    z,zt = ((o[m]/T).softmax(-1) for o in logits())
    ids = zt.topk(K, -1).indices
    p,t = (torch.cat([o.gather(-1, ids), o.scatter(-1, ids, 0.).sum(-1, keepdim=True)], -1) for o in (z,zt))
    return T**2*F.kl_div(p.log(), t, reduction='batchmean')

def torch_soft_ce(T): return F.cross_entropy(logits()[0][m], torch.zeros(8, V, dtype=torch.float64).scatter_add(-1, lots.ids, lots.weights))

def trl(T, beta, **kw):
    from trl.experimental.gkd import GKDTrainer
    return GKDTrainer.generalized_jsd_loss(*(o[None] for o in logits()), labels=y[None], beta=beta, temperature=T, **kw)

def trl_top(T, add_tail):
    from trl.experimental.iw_opd.iw_opd_trainer import IWOPDTrainer
    return IWOPDTrainer.generalized_jsd_loss(*(o[None] for o in logits()), labels=y[None], beta=0., temperature=T, top_k=K, add_tail=add_tail)

def trl_own(T):
    from trl.experimental.sdpo.loss_utils import compute_topk_self_distillation_loss
    return compute_topk_self_distillation_loss(*(o[m] for o in logits()), distillation_topk=K, distillation_alpha=0., distillation_add_tail=True).mean()

def liger(T, beta, hard=0., teacher=WT):
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss
    return LigerFusedLinearJSDLoss(hard, 1-hard, beta, temperature=T, compiled=False)(h, W, hT, teacher, y)

def torchtune(T, name):
    "Its file of losses alone: the whole package asks for a torchao that matches torch, which no pair of releases need have"
    file,chunked = next(o for o in files('torchtune') if o.name=='kd_losses.py'),'Chunked' in name
    f = runpy.run_path(str(file.locate()))[name]
    z,zt = (o[None].chunk(5, 1) if chunked else o[None] for o in logits())
    return (f(5) if chunked else f())(z, zt, y[None])

def textbrewer(T):
    sys.modules.setdefault('torch.utils.tensorboard', SimpleNamespace(SummaryWriter=None)) # its distillers ask for it, its losses do not
    from textbrewer.losses import kd_ce_loss
    return kd_ce_loss(*(o[None,m] for o in logits()), T)

# The rows: package, its loss, T, ours, theirs, and the rule by which they differ, with the loss that it gives

mixes = (0., 'forward_kl'),(.1, partial(jsd, beta=.1)),(.5, jsd),(1., 'reverse_kl')

def rows_of(T):
    "All comparisons at a temperature"
    rule,cut = (lambda f: None if T==1 else smaller(f, T)),f'no tail: KL among the top {K} alone' + '; no T^2'*(T!=1)
    yield 'torch', 'F.kl_div', T, partial(ours, f='forward_kl'), torch_kl, None
    yield 'torch', 'F.kl_div, sides swapped', T, partial(ours, f='reverse_kl'), partial(torch_kl, reverse=True), None
    for b,f in mixes[1:3]: yield 'torch', f'F.kl_div to the mixture, beta {b:g}', T, partial(ours, f=f), partial(torch_jsd, beta=b), None
    yield 'torch', f'F.kl_div, top {K} and the rest', T, bucket, torch_bucket, None
    if T==1: yield 'torch', 'F.cross_entropy, sampled ids', T, partial(ours, target=lots), torch_soft_ce, None
    for b,f in mixes: yield 'trl', f'GKD, beta {b:g}', T, (o := partial(ours, f=f)), partial(trl, beta=b), rule(o)
    yield 'trl', f'IW-OPD, top {K} with tail', T, bucket, partial(trl_top, add_tail=True), rule(bucket)
    yield 'trl', f'IW-OPD, top {K}, no tail', T, bucket, partial(trl_top, add_tail=False), (cut,lambda: renormalised(T))
    if T==1: yield 'trl', f'SDPO, top {K} with tail', T, bucket, trl_own, ("the ids are the student's best, not the teacher's",lambda: bucket(T, True))
    for b,f in mixes: yield 'liger-kernel', f'fused JSD, beta {b:g}', T, (o := partial(ours, f=f)), partial(liger, beta=b), rule(o)
    mixed = None if T==1 else ('no T^2 on the soft part', lambda: ours(T, kl=.7/T**2, ce=.3))
    yield 'liger-kernel', 'fused JSD, beta 0, 0.3 of labels', T, partial(ours, kl=.7, ce=.3), partial(liger, beta=0., hard=.3), mixed
    pad = 'fills up the student with logits of 0, where ours takes the ids that both have' + '; no T^2'*(T!=1)
    yield 'liger-kernel', 'fused JSD, beta 0, teacher of 3 ids more', T, more_ids, partial(liger, beta=0., teacher=torch.cat([WT, extra])), (pad,lambda: zero_padded(T)/T**2)
    yield 'textbrewer', 'kd_ce_loss', T, ours, textbrewer, plus_entropy(T)
    if T!=1: return
    for name in ('ForwardKLLoss', 'ForwardKLWithChunkedOutputLoss'): yield 'torchtune', name, T, ours, partial(torchtune, name=name), plus_entropy(T)
    yield 'torchtune', 'ReverseKLLoss', T, partial(ours, f='reverse_kl'), partial(torchtune, name='ReverseKLLoss'), None
    yield 'torchtune', 'SymmetricKLLoss', T, symmetric, partial(torchtune, name='SymmetricKLLoss'), plus_entropy(T, symmetric, .5)

def value(loss): return loss.item(),torch.autograd.grad(loss, h)[0].flatten()

def compare(a, ga, b, gb):
    "Ratio of the losses, factor between the gradients, and what is left of `gb` when that multiple of `ga` is taken away, relative"
    c = (ga@gb/(ga@ga)).item()
    return b/a,c,((gb-c*ga).norm()/gb.norm()).item()

def off(a, ga, b, gb): return max(abs(b/a-1), ((ga-gb).norm()/gb.norm()).item())

def why_not(name, e):
    "Why a peer did not run: what pip said, if pip could not install it"
    said = Path(sys.prefix)/f'{name}.why'
    return said.read_text().strip() if said.exists() else f'{type(e).__name__}: {" ".join(str(e).split())[:100]}'

def row(name, what, T, mine, theirs, rule):
    "One line of the table, and whether it is as it should be"
    try: peer = value(theirs(T))
    except (ImportError, PackageNotFoundError, StopIteration) as e: return f'| {name} | {what} | {T:g} | | | | not run: {why_not(name, e)} | |',True
    us = value(mine(T))
    by,o = ('agrees', off(*us, *peer)) if rule is None else (rule[0], off(*value(rule[1]()), *peer))
    v,c,rest = compare(*us, *peer)
    return f'| {name} {version(name)} | {what} | {T:g} | {v:.4f} | {c:.4f} | {rest:.0e} | {by if o<1e-5 else "DIFFERS"} | {o:.0e} |',o<1e-5

def section(lines):
    what = f'Losses of other packages against ours, and their gradients with respect to the student\'s hidden states: means over 8 targets among {N} positions, hidden {d}, vocabulary {V}, float64, random numbers.'
    how = "Value and gradient are theirs over ours; rest is what of their gradient is no multiple of ours. Where they differ the table says by what rule, and the last column how far they are from our functions put together by that rule, in value and in gradient, relative."
    head = ['| package | loss | T | value | gradient | rest | verdict or rule | off by |', '|---|---|---|---|---|---|---|---|']
    return '\n\n'.join(['## Agreement', what + ' ' + how, f'Machine: {machine()}.', '\n'.join(head + lines)])

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--no-write', action='store_true', help='print only')
    a = p.parse_args()
    lines,good = zip(*(row(*o) for T in (1.,2.) for o in rows_of(T)))
    text = section(list(lines))
    print(text)
    if not a.no_write: write(text)
    sys.exit(not all(good))

if __name__=='__main__': main()
