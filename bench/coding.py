#!/usr/bin/env python3
"""What was tried to store the integers of the codec `transform` in fewer bytes, at equal loss.

usage: coding.py [--answers 64] [--tokens 128] [--nats .01] [--constriction FOLDER] [--no-write]

The codec is fitted on answers of the default teacher to training prompts, and every way stores the same answers to held-out prompts and to prompts of
other families. The step is found on these, so that the KL at T=1 is the same for all and bytes compare. FOLDER is where
`pip install --no-deps --target FOLDER constriction` put an entropy coder (range coding by asymmetric numeral systems); without it there is its ideal
code length. Prints a Markdown table and writes it as the section "Coding" of RESULTS.md; speeds are of decoding to integers, on one thread, in CPU time, best of five.
"""
import argparse, contextlib, math, sys
from unittest import mock

import numpy as np, torch
from cache import asked, machine, quickest
from loss import write

from distill_nb import codecs
from distill_nb.codecs import CHUNK, compress_chunk, decompress_chunk, fisher, mean_kl, transform_basis
from distill_nb.synthesis import TeacherSynthesizer, embedded_teacher, head_of

TS = (1, 2, 4)

@contextlib.contextmanager
def coder(band, level):
    "Frames of another kind"
    z = codecs.zstandard.ZstdCompressor
    with mock.patch.object(codecs, 'BAND', band), mock.patch.object(codecs.zstandard, 'ZstdCompressor', lambda **kw: z(**kw | dict(level=level))): yield

def packed(k, chunk=CHUNK, band=codecs.BAND, level=1):
    "Bytes per token, and tokens decoded per second"
    with coder(band, level): frames = [compress_chunk(o) for o in k.split(chunk)]
    return sum(map(len, frames))/len(k),rate(lambda: [decompress_chunk(o, k.shape[1]) for o in frames], len(k))

def rate(f, n, repeats=5): return n/quickest(f, repeats)

def in_steps(h, head, nats, mu, basis, inverse, rounding=torch.round, scale=1., rounds=4):
    "Integers at the step at which the KL at T=1 is `nats`, that step, and the KL at each T"
    y,D = (h-mu)@basis/scale,math.sqrt(48*nats/len(mu))
    back = lambda: mu+(rounding(y/D)*scale*D)@inverse
    for _ in range(rounds): D *= math.sqrt(nats/mean_kl(h, back(), head))
    return rounding(y/D).int(),D,[mean_kl(h, back(), head, T) for T in TS]

def ideal(k, law):
    "Bytes per token of an ideal code, whose probabilities are those of a law with a fixed spread for each component"
    p = law.cdf(k.double()+.5)-law.cdf(k.double()-.5)
    return -p.clamp_min(1e-12).log2().sum(-1).mean().item()/8

def ans(k, spread, law):
    "Bytes per token and tokens per second of constriction's coder"
    import constriction
    x,s = k.T.reshape(-1).numpy().astype(np.int32),np.repeat(spread.double().numpy(), len(k))
    model,zero = getattr(constriction.stream.model, law)(-32768, 32767),np.zeros(len(x))
    c = constriction.stream.stack.AnsCoder()
    c.encode_reverse(x, model, zero, s)
    bits = c.get_compressed()
    read = lambda: constriction.stream.stack.AnsCoder(bits).decode(model, zero, s)
    assert (read()==x).all()
    return bits.nbytes/len(k),rate(read, len(k), 2)

@torch.no_grad()
def sensitivity(h, head, inverse):
    "What an error of one in every component costs each token at T=1, to second order, over its mean"
    w = head.weight.float()@inverse.T
    t = torch.cat([torch.stack([p@w.square().sum(1), (p@w).square().sum(1)]) for p in (head(o).softmax(-1) for o in h.split(128))], 1)
    cost = t[0]-t[1]
    return cost/cost.mean()

def dead_zone(share): return lambda u: u.sign()*(u.abs()+.5-share).floor().clamp_min(0)

def ways(train, h, head, nats, coders):
    "Name, bytes, tokens per second (None where nothing is decoded), KL at each T"
    calib = train[torch.linspace(0, len(train)-1, min(1024, len(train))).long()]
    own = transform_basis(train, fisher(calib, head))
    k,D,kl = in_steps(h, head, nats, *own)
    yield 'as it is',*packed(k),kl
    for b in (16, 32, 128): yield f'bands of {b} components instead of {codecs.BAND}',*packed(k, band=b),kl
    yield f'chunks of {2*CHUNK} tokens instead of {CHUNK}',*packed(k, 2*CHUNK),kl
    for l in (3, 9, 19): yield f'zstd level {l} instead of 1',*packed(k, level=l),kl
    y = (train-own[0])@own[1]/D
    sd,mad = y.std(0).double(),y.abs().mean(0).double()
    for name,law,spread in (('Gaussian', torch.distributions.Normal, sd), ('Laplace', torch.distributions.Laplace, mad)):
        yield f'ideal code, {name} of fixed spread',ideal(k, law(torch.zeros_like(spread), spread)),None,kl
        if coders: yield f'constriction, {name} of fixed spread',*ans(k, spread, f'Quantized{name}'),kl
    for share in (.05, .1):
        o,_,l = in_steps(h, head, nats, *own, rounding=dead_zone(share))
        yield f'dead zone, {.5+share:g} of a step to each side',*packed(o),l
    for power in (.25, .5):
        s = torch.exp2((-8*power*sensitivity(h, head, own[2]).log2()).round()/8).clamp(.25, 8)[:,None]
        o,_,l = in_steps(h, head, nats, *own, scale=s)
        b,r = packed(o)
        yield f'a step for each token, by its sensitivity at T=1 to the power of -{power:g}, in a byte',b+1,r,l
    for Ts in ((1,), (1, 2)):
        o,_,l = in_steps(h, head, nats, *transform_basis(train, fisher(calib, head, Ts)))
        yield f"a basis for T = {', '.join(map(str, Ts))} alone",*packed(o),l

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for k,v in dict(answers=64, tokens=128).items(): p.add_argument(f'--{k}', type=int, default=v)
    p.add_argument('--nats', type=float, default=.01)
    p.add_argument('--constriction', help='folder that it was installed into')
    p.add_argument('--no-write', action='store_true', help='print only')
    a = p.parse_args()
    if a.constriction: sys.path.append(a.constriction)
    torch.set_num_threads(1)
    teacher = TeacherSynthesizer(embedded_teacher(), device='cpu', dtype=torch.float32)
    _,train = asked(teacher, 'train', a.answers, a.tokens)
    h = torch.cat([asked(teacher, s, 8, a.tokens//2)[1] for s in ('heldout', 'ood')])
    lines = [f'## Coding\n\n{len(h)} tokens, the codec fitted on {len(train):,} others, {a.nats:g} nats asked for. Machine: {machine()}.\n',
        '| way | bytes | million tokens/s | nats, T=1 | T=2 | T=4 |', '|---|---|---|---|---|---|']
    print('\n'.join(lines))
    for n,b,r,l in ways(train, h, head_of(teacher.model), a.nats, a.constriction):
        lines.append(f"| {n} | {b:.1f} | {'' if r is None else f'{r/1e6:.2f}'} | "+' | '.join(f'{o:.2e}' for o in l)+' |')
        print(lines[-1], flush=True)
    if not a.no_write: write('\n'.join(lines))

if __name__=='__main__': main()
