#!/usr/bin/env python3
"""Size, error and reading speed of every codec of the teacher cache, on text that none of them was fitted to.

usage: cache.py [--quick] [--answers 64] [--tokens 128] [--rows 8192] [--teacher FOLDER] [--distillkit FOLDER] [--no-write]

The default teacher answers training prompts, on which the codecs are fitted, and held-out prompts of the same families and of others, on which they
are judged. Prints Markdown tables and then one line per bar, `BAR name value limit ok|short`, writes both as the sections "Cache" and "DistillKit's store" of RESULTS.md, and exits 1 if one
is short. `--quick` calibrates on a fifth, and writes nothing.
Speeds are of one thread, in CPU time (so a busy machine disturbs them less), best of five: in slices of 512 rows, from memory, and as a trainer reads them,
from the files of a cache in batches of four texts. Top-k of 188 takes as many bytes as int8 hidden states. With `--teacher` the same of another model and its tokenizer; that is printed and not written.

Also what the product of head and state in bf16 costs, which a `Distiller` makes by default.

DistillKit's store, with the two settings that its README names, is on the same page: by its published rule, and where FOLDER is a checkout of
https://github.com/arcee-ai/DistillKit by its own code too. It knows no temperature; its losses divide the stored log-probabilities by T, and so does this.
"""
import argparse, math, platform, re, sys, tempfile, time
from pathlib import Path

import torch

from distill_nb.codecs import kl_nats, mean_kl
from distill_nb.sparse import Counts, fit_all
from distill_nb.stages import score_cache
from distill_nb.synthesis import TeacherSynthesizer, embedded_teacher, head_of, load_prompts, pad
from loss import write

STORES = (('bf16', {}), ('fp16', {}), ('fp8', {}), ('int8', {}), *(('transform', dict(nats=o)) for o in (1e-3, 1e-2, 5e-2)),
    *(('topk', dict(k=o)) for o in (16, 64, 188, 256)), ('sampled', dict(nbytes=36)))
TS,SLICE = (1, 2, 4),512
DISTILLKIT = dict(recommended=(128, 16, (0, 1, 2, 3, 4, .5)), budget=(50, 1, (0, 1, .5)))

def asked(teacher, split, n, tokens):
    "Answers of the teacher, and the input of its head at each of their tokens"
    exs = teacher.generate(load_prompts(split, n)['prompt'], max_new_tokens=tokens, temperature=0.8, progress=False, capture=True)
    return exs,torch.cat([e['hidden'] for e in exs]).float()

def student_states(teacher, exs):
    "The input of the head in the teacher without six of its blocks; the teacher is left without them"
    blocks = teacher.model.model.layers
    del blocks[len(blocks)//3:len(blocks)//3+6]
    out = teacher.score(*pad([e['input_ids'] for e in exs]))['head_input']
    return torch.cat([o[e['prompt_len']-1:len(e['input_ids'])-1] for o,e in zip(out, exs)]).float()

def nats(codec, t, h, head):
    "KL(teacher || store) at each T; None where the store has none"
    if codec.gives=='counts': return [None]*len(TS)
    x = codec.decode(t, 0, len(h))
    if codec.gives=='hidden': return [mean_kl(h, x.float(), head, T) for T in TS]
    res = []
    for j,T in enumerate(TS):
        kls = []
        for o in torch.arange(len(h)).split(64):
            z = head(h[o])/T
            kls.append(kl_nats(z, type(x)(*(v[o] for v in x)).log_probs(j, T, torch.zeros_like(z))))
        res.append(torch.cat(kls).mean().item())
    return res

def product(h, head):
    "KL(the product of head and state in fp32 || the same numbers multiplied in bf16) at each T, both as stored in bf16"
    low,wide = head._replace(weight=head.weight.bfloat16()),head._replace(weight=head.weight.bfloat16().float())
    kls = {T: [] for T in TS}
    for o in h.bfloat16().split(128):
        a,b = wide(o.float()),torch.mm(o, low.weight.T).float()
        for T in TS: kls[T].append(kl_nats(a, b, T))
    return [torch.cat(l).mean().item() for l in kls.values()]

def distillkit(z, k, exact, powers):
    "Bytes per token, ids and log-probabilities of the k largest: some in bf16, the others a curve of their rank, by least squares, its factors in fp32"
    v,ids = z.double().log_softmax(-1).topk(k)
    ranks = torch.stack([torch.arange(k-exact).double()**p for p in powers], 1)
    fit = torch.linalg.lstsq(ranks, v[:,exact:].T).solution.float().double()
    nbytes = -(-k*(z.shape[-1]-1).bit_length()//8)+2*exact+4*len(powers)
    return nbytes,ids,torch.cat([v[:,:exact].bfloat16().double(), (ranks@fit).T], 1)

def their_own(z, k, exact, powers):
    "The same by DistillKit's code"
    from distillkit.compression import DistributionQuantizationConfig, LogprobCompressor
    c = LogprobCompressor(DistributionQuantizationConfig(d=z.shape[-1], k=k, exact_k=exact, exact_dtype='bfloat16', delta_encoding=False, residual_bins=[],
        polynomial_terms=['sqrt' if p==.5 else p for p in powers]))
    t = c.compress(z.log_softmax(-1))
    return sum(o.shape[-1]*o.element_size() for o in t.values()),*c.decompress_to_sparse(t)

def spread(ids, v, V, T):
    "What stored log-probabilities stand for at T: what they lack of 1 is one outcome more, spread evenly over the other ids"
    v = v.double()
    rest = (1-v.exp().sum(-1, keepdim=True)).clamp_min(1e-8).log()/T
    q = (rest-math.log(V-ids.shape[-1])).expand(len(v), V).scatter(-1, ids, v/T)
    return q-torch.logaddexp((v/T).logsumexp(-1, keepdim=True), rest)

def peer(store, h, head, *how):
    "Bytes per token, and KL(teacher || store) at each T, of a rival's store"
    kls = {T: [] for T in TS}
    for o in h.split(64):
        z = head(o)
        nbytes,ids,v = store(z, *how)
        for T in TS: kls[T].append(kl_nats(z/T, spread(ids, v, z.shape[-1], T)))
    return nbytes,*(torch.cat(l).mean().item() for l in kls.values())

def quantisation(codec, t, h, head):
    "What eight bits add to the KL over k+1 outcomes, the most at any T"
    x,worst = codec.decode(t, 0, len(h)),0
    z = torch.cat([head(o) for o in h.split(128)])
    v = z.gather(-1, x.ids)
    for j,T in enumerate(TS):
        tail = (z.scatter(-1, x.ids, -torch.inf)/T).logsumexp(-1)
        rows = [torch.cat([a/T, b[:,None]], 1) for a,b in ((v, tail), (x.logits, x.tails[:,j]))]
        worst = max(worst, kl_nats(*rows).mean().item())
    return worst

def noise(codec, h, hs, head):
    "Root mean square error of the student's loss: of threshold sampling, and of draws with replacement that take the same bytes"
    t,c = head(h).softmax(-1),-head(hs).log_softmax(-1)
    g = torch.Generator().manual_seed(0)
    draw = lambda n: torch.multinomial(t, n, replacement=True, generator=g)
    size = lambda i: sum(1+3*len(r.unique()) for r in i)/len(i)
    off = lambda x: (x.weights*c.gather(-1, x.ids)).sum(-1)-(t*c).sum(-1)
    s = codec.encode(h, head)
    n = max(n for n in range(10, 100, 2) if size(draw(n))<=sum(o.nbytes for o in s.values())/len(h))
    theirs = torch.stack([off(Counts(i, torch.full(i.shape, 1/n))) for i in (draw(n) for _ in range(4))])
    ours = torch.stack([off(codec.decode(codec.encode(h+e, head), 0, len(h))) for e in (0, 1e-6, 2e-6, 3e-6)])
    return n,*(o.square().mean().sqrt().item() for o in (ours, theirs))

def quickest(f, repeats=5):
    "CPU seconds of `f`, the best of some runs"
    best = math.inf
    for _ in range(repeats):
        start = time.process_time()
        f()
        best = min(best, time.process_time()-start)
    return best

def rate(f, n):
    "Rows per second of CPU time over `n` rows"
    return n/quickest(lambda: [f(a, a+SLICE) for a in range(0, n, SLICE)])

def speeds(fitted, h, head, rows):
    "Rows per second: memcpy of fp32 hidden states, and of each codec; the transform also as integers for a folded head"
    h = h.repeat(-(-SLICE//len(h)), 1)[:SLICE]
    x = h.repeat(rows//SLICE, 1)
    res = dict(memcpy=rate(lambda a, b: x[a:b].clone(), rows))
    for k,c in fitted.items():
        few = c.encode(h, head)
        many = c.encode(x, head) if c.gives=='hidden' else {n: v.repeat(rows//SLICE, *(1,)*(v.dim()-1)) for n,v in few.items()}
        read = lambda a, b: c.decode(many, a, b)
        res[k] = rate(read if c.gives!='hidden' or k.startswith('transform') else lambda a, b: read(a, b).float().contiguous(), rows)
        if k.startswith('transform'): res[k+' levels'] = rate(lambda a, b: c.levels(many, a, b), rows)
    return res

def from_disk(teacher, exs, root):
    "Target tokens per second from the files of a cache to the batches of a trainer, four texts each"
    res,texts = {},[dict(input_ids=e['input_ids'], prompt_len=e['prompt_len']) for e in exs]
    for name,how in dict(bf16={}, int8=dict(dtype='int8'), transform=dict(codec='transform'), topk=dict(codec='topk', k=64)).items():
        c = score_cache(teacher, [dict(prompt=str(i)) for i in range(len(exs))], texts, root/name, **how)
        c.stats() # opens and verifies every shard
        batches = torch.randperm(len(c), generator=torch.Generator().manual_seed(0)).split(4)
        def _read():
            for o in batches: c.collate([c[i] for i in o.tolist()])
        res[name] = sum(len(e['input_ids'])-e['prompt_len'] for e in texts)/quickest(_read)
    return res

def bars(res, added, ratio, speed):
    "Name, value, limit, and whether it holds"
    most = lambda k, i: max(r[k][i] for r in res.values())
    yield from (('int8 bytes', most('int8', 0), 600), *((f'int8 nats T={T}', most('int8', i), 7e-4) for i,T in enumerate(TS, 1)))
    for k,limit in (('0.001', 400), ('0.01', 280), ('0.05', 205)):
        yield f'transform {k} bytes', most(f'transform {k}', 0), limit
        yield f'transform {k} nats, T=2 and 4 over T=1', max(max(r[f'transform {k}'][2:])/r[f'transform {k}'][1] for r in res.values()), 1
    for name,r in res.items():
        l = r['transform 0.01'][1]
        yield from ((f'transform 0.01 {name} nats above', l, 1.3e-2), (f'transform 0.01 {name} nats below', l, 0.7e-2, '>='))
    yield from (('topk 64 bytes', most('topk 64', 0), 208), ('topk 64 quantisation nats', added, 1e-4))
    yield from (('sampled bytes', most('sampled 36', 0), 42), ('sampled noise ratio', ratio, .5))
    yield 'topk 64 tokens/s', speed['topk 64'], 1e6, '>='
    yield 'transform 0.01 tokens/s', speed['transform 0.01 levels'], 3e5, '>='
    for k in ('bf16', 'int8'): yield f'{k} share of memcpy', speed[k]/speed['memcpy'], .5, '>='

def said(bars):
    "Is none short, and a line for each"
    lines = [(value>=limit if way else value<=limit, name.replace(' ', '_'), value, limit) for name,value,limit,*way in bars]
    return all(ok for ok,*_ in lines),'\n'.join(['```', *(f"BAR {n} {v:.3g} {l:.3g} {'ok' if ok else 'short'}" for ok,n,v,l in lines), '```'])

def rows(split, h, res):
    "Lines of the table of sizes and errors"
    return [f'| {split}, {len(h)} tokens | {k} | {b:.0f} | '+' | '.join('-' if o is None else f'{o:.1e}' for o in l)+' |' for k,(b,*l) in res.items()]

def table(lines): return '\n'.join(['| text | codec | bytes | nats, T=1 | T=2 | T=4 |', '|---|---|---|---|---|---|', *lines])

SPEEDS = """Speeds are millions of tokens per second of CPU time, read in slices of 512 rows as fp32; *levels* are the integers of the transform, for a folded head.
From disk: target tokens, in shuffled batches of four texts, everything that a batch needs."""
PEERS = """The largest log-probabilities with the two settings that DistillKit's README names, on the answers of the section "Cache": by the rule it publishes
(some in bf16, the others a least-squares curve of their rank, ids in the bits of the vocabulary) and by the code of its repository, commit a61c2e7.
What is stored falls short of 1; its losses take that as one outcome more, which is raised to the power 1/T with the rest. Here it is spread evenly over the ids
that are not stored. KL(teacher || store), nats per token; `cache.py --distillkit FOLDER` prints these rows."""

def machine():
    cpu = re.search(r'model name\s*:\s*(.+)', Path('/proc/cpuinfo').read_text())
    return f"{cpu[1] if cpu else platform.processor()}, one thread; Python {platform.python_version()}, torch {torch.__version__}"

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for k,v in dict(answers=64, tokens=128, rows=8192).items(): p.add_argument(f'--{k}', type=int, default=v)
    p.add_argument('--quick', action='store_true', help='calibrate on 24 answers of 64 tokens, print only')
    p.add_argument('--teacher', help='folder of another model; default: the embedded one')
    p.add_argument('--distillkit', help='a checkout of DistillKit')
    p.add_argument('--no-write', action='store_true', help='print only')
    a = p.parse_args()
    rivals = {'by its rule': distillkit}
    if a.distillkit:
        sys.path.append(a.distillkit)
        rivals['by its code'] = their_own
    if a.quick: a.answers,a.tokens = 24,64
    if a.quick or a.teacher: a.no_write = True
    torch.set_num_threads(1)
    teacher = TeacherSynthesizer(a.teacher or embedded_teacher(), device='cpu', dtype=torch.float32)
    head = head_of(teacher.model)
    train,h = asked(teacher, 'train', a.answers, a.tokens)
    with tempfile.TemporaryDirectory() as d: disk = from_disk(teacher, train, Path(d))
    text = {s: asked(teacher, s, 8, a.tokens//2) for s in ('heldout', 'ood')}
    fitted,res,theirs,made = fit_all(h, head, STORES, TS),{},[],{}
    for s,(_,x) in text.items():
        made[s] = product(x, head)
        stored = {k: c.encode(x, head) for k,c in fitted.items()}
        res[s] = {k: (sum(v.nbytes for v in stored[k].values())/len(x), *nats(c, stored[k], x, head)) for k,c in fitted.items()}
        theirs += rows(s, x, {f'DistillKit, {n}, {way}': peer(f, x, head, *how) for n,how in DISTILLKIT.items() for way,f in rivals.items()})
    exs,x = text['heldout']
    added = quantisation(fitted['topk 64'], fitted['topk 64'].encode(x, head), x, head)
    n,ours,draws = noise(fitted['sampled 36'], x, student_states(teacher, exs), head)
    speed = speeds(fitted, x, head, a.rows)
    fine,bar = said(bars(res, added, ours/draws, speed))
    read = speed | {f'{k}, from disk to batches': v for k,v in disk.items()}
    own = table([o for s,(_,x) in text.items() for o in rows(s, x, res[s])])
    mine = '\n\n'.join(['## Cache', f'Codecs fitted on {len(h):,} tokens. Machine: {machine()}.', own,
        'Head and state in bf16, multiplied in bf16 instead of fp32: ' + ', '.join(f'{s} {", ".join(f"{v:.1e}" for v in o)}' for s,o in made.items()) + ' nats at T = 1, 2 and 4.',
        f'Loss noise on the teacher without six blocks: threshold sampling {ours:.3f} nats, {n} draws with replacement in the same bytes {draws:.3f}.',
        '\n'.join(['| read | million tokens/s |', '|---|---|', *(f'| {k} | {v/1e6:.2f} |' for k,v in read.items())]), SPEEDS, bar])
    peers = '\n\n'.join(["## DistillKit's store", PEERS, f'Machine: {machine()}.', table(theirs)])
    print(mine, peers, sep='\n\n')
    if not a.no_write:
        write(mine)
        if a.distillkit: write(peers)
    return 0 if fine else 1

if __name__=='__main__': sys.exit(main())
