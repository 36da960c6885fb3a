#!/usr/bin/env python3
"""Time and peak memory of distillation losses, forward plus backward, each run in a fresh process.

usage: loss.py [--tokens 2048] [--hidden 576] [--vocab 49152] [--k 50] [--pairs 5] [--threads 1 2] [--peers FOLDER] [--no-write] [--quick]

Prints a Markdown table with ratios to plain cross-entropy and a line per bar, writes both as the section "Loss" of RESULTS.md beside this file, and exits 1 where a bar is short.
Where there is a GPU, the same table follows at 8,192 tokens, hidden 4,096 and vocabulary 128,256, without bars; where there is none, a line says so.
With FOLDER, where `pip install --no-deps --target FOLDER trl liger-kernel torchtune textbrewer` put them, also the losses of these packages.
Time is CPU time on one thread, else wall-clock time. Memory is the peak of resident memory during the call (VmHWM) less what was resident before it, with all inputs in place and what making them
left free in the heap given back. On a GPU it is the peak of what torch has allocated. Linux with glibc only.
"""
import argparse, ctypes, json, math, os, platform, re, runpy, subprocess, sys, time
from importlib.metadata import files
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import torch, torch.nn.functional as F
from torch import nn

from distill_nb.divergences import top_k
from distill_nb.loss import linear_divergence

RESULTS = Path(__file__).with_name('RESULTS.md')
T = 2.

def status(key):
    "A line of /proc/self/status, in MiB"
    return int(re.search(rf'^{key}:\s+(\d+) kB', Path('/proc/self/status').read_text(), re.M)[1])/1024

def inputs(a, device='cpu'):
    "Student states and head, teacher states and head, labels; the same for every contender"
    g = torch.Generator(device).manual_seed(0)
    h,hT = (torch.randn(a.tokens, a.hidden, generator=g, device=device) for _ in range(2))
    heads = [nn.Linear(a.hidden, a.vocab, bias=False, device=device) for _ in range(2)]
    with torch.no_grad():
        for o in heads: o.weight.normal_(0., 3/a.hidden**.5, generator=g)
    return h.requires_grad_(), heads[0], hT, heads[1].requires_grad_(False), torch.randint(a.vocab, (a.tokens,), generator=g, device=device)

@torch.no_grad()
def sparse(hT, head, k):
    "Top-k targets, made a few rows at a time"
    parts = [top_k(head(o), k, T) for o in hT.split(128)]
    return parts[0]._replace(**{o: torch.cat([getattr(p, o) for p in parts]) for o in ('ids', 'logits', 'tail_lse')})

def plain_ce(h, S, hT, Te, y, a): return lambda: F.cross_entropy(S(h), y, reduction='sum')

def textbook_kl(h, S, hT, Te, y, a):
    zt = Te(hT)
    def f():
        log_p,t = F.log_softmax(S(h)/T, -1),F.softmax(zt/T, -1)
        return T**2*F.kl_div(log_p, t, reduction='sum')
    return f

def ours_head(h, S, hT, Te, y, a): return lambda: linear_divergence(h, S, (hT,Te), T).loss

def ours_head_bf16(h, S, hT, Te, y, a):
    hT,Te = hT.bfloat16(),Te.bfloat16()
    return lambda: linear_divergence(h, S, (hT,Te), T, teacher_dtype=torch.bfloat16).loss

def ours_head_ce(h, S, hT, Te, y, a): return lambda: linear_divergence(h, S, (hT,Te), T, y, kl=.9, ce=.1).loss

def ours_dense(h, S, hT, Te, y, a):
    zt = Te(hT)
    return lambda: linear_divergence(h, S, zt, T).loss

def ours_dense_ce(h, S, hT, Te, y, a):
    zt = Te(hT)
    return lambda: linear_divergence(h, S, zt, T, y, kl=.9, ce=.1).loss

def ours_top_k(h, S, hT, Te, y, a):
    kept = sparse(hT, Te, a.k)
    return lambda: linear_divergence(h, S, kept, T).loss

def ours_top_k_ce(h, S, hT, Te, y, a):
    kept = sparse(hT, Te, a.k)
    return lambda: linear_divergence(h, S, kept, T, y, kl=.9, ce=.1).loss

def ours_reverse(h, S, hT, Te, y, a):
    zt = Te(hT)
    return lambda: linear_divergence(h, S, zt, T, divergence='reverse_kl').loss

def trl(h, S, hT, Te, y, a):
    from trl.experimental.gkd import GKDTrainer
    return lambda: GKDTrainer.generalized_jsd_loss(S(h)[None], Te(hT)[None], labels=y[None], beta=0., temperature=T)

def liger(h, S, hT, Te, y, a):
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss
    f = LigerFusedLinearJSDLoss(0., 1., 0., temperature=T, compiled=False)
    return lambda: f(h, S.weight, hT, Te.weight, y)

def torchtune(h, S, hT, Te, y, a):
    "Its file of losses alone: the whole package asks for a torchao that matches torch"
    file = next(o for o in files('torchtune') if o.name=='kd_losses.py')
    f = runpy.run_path(str(file.locate()))['ForwardKLLoss']()
    return lambda: f(S(h)[None]/T, Te(hT)[None]/T, y[None])

def textbrewer(h, S, hT, Te, y, a):
    sys.modules['torch.utils.tensorboard'] = SimpleNamespace(SummaryWriter=None) # its distillers ask for it, its losses do not
    from textbrewer.losses import kd_ce_loss
    return lambda: kd_ce_loss(S(h), Te(hT), T)

PEERS = {'TRL GKD': trl, 'Liger fused JSD': liger, 'torchtune ForwardKLLoss': torchtune, 'TextBrewer kd_ce_loss': textbrewer}
HEAD,DENSE,TOP_K = "ours, teacher's hidden states and head",'ours, stored dense logits','ours, top-k with bucket'
HEAD_BF16,MIXED = HEAD+', its product in bf16',' and cross-entropy'
CONTENDERS = {'plain cross-entropy': plain_ce, 'kl_div on full logits, stored targets': textbook_kl, HEAD: ours_head, HEAD_BF16: ours_head_bf16, HEAD+MIXED: ours_head_ce,
    DENSE: ours_dense, DENSE+MIXED: ours_dense_ce, TOP_K: ours_top_k, TOP_K+MIXED: ours_top_k_ce, DENSE+', reverse KL': ours_reverse} | PEERS
BARS = {TOP_K: (1., .2), DENSE: (1.1, .45), HEAD: (1.35, .3), HEAD_BF16: (1.2, .3)} # of plain, time and memory
MIXED_BAR = .1 # what cross-entropy beside a temperature other than 1 may add to the ratio of times
GPU = dict(device='cuda', tokens=8192, hidden=4096, vocab=128256)

def on_cpu(f, threads):
    "Seconds and MiB of one call"
    ctypes.CDLL(None).malloc_trim(0)
    Path('/proc/self/clear_refs').write_text('5')
    clock = time.process_time if threads==1 else time.perf_counter
    before,start = status('VmRSS'),clock()
    f().backward()
    return clock()-start,status('VmHWM')-before

def on_gpu(f, trained):
    "Seconds and MiB of the second of two calls, since the first one loads and chooses kernels; nan where memory is too small"
    try:
        f().backward()
        for o in trained: o.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before,start = torch.cuda.memory_allocated(),time.perf_counter()
        f().backward()
        torch.cuda.synchronize()
    except torch.OutOfMemoryError: return math.nan,math.nan
    return time.perf_counter()-start,(torch.cuda.max_memory_allocated()-before)/2**20

def one(a):
    "One measured call in this process, after a small one that loads what torch loads late"
    torch.set_num_threads(a.threads[0])
    small = argparse.Namespace(**vars(a)|dict(tokens=4, hidden=8, vocab=a.k+8))
    CONTENDERS[a.one](*inputs(small, a.device), small)().backward()
    h,S,*rest = inputs(a, a.device)
    f = CONTENDERS[a.one](h, S, *rest, a)
    del rest
    s,mib = on_cpu(f, a.threads[0]) if a.device=='cpu' else on_gpu(f, (h,S.weight))
    print(json.dumps(dict(s=s, mib=mib)))

def spawn(a, name, threads):
    size = [o for k in ('tokens', 'hidden', 'vocab', 'k', 'device') for o in (f'--{k}', str(getattr(a, k)))]
    if a.peers: size += ['--peers', a.peers]
    out = subprocess.run([sys.executable, __file__, *size, '--threads', str(threads), '--one', name], capture_output=True, text=True, check=True,
        env=os.environ|dict(OMP_NUM_THREADS=str(threads)))
    return json.loads(out.stdout.splitlines()[-1])

def measure(a, threads):
    "Medians of interleaved runs: `{contender: (seconds, MiB)}`"
    runs = {k: [] for k in CONTENDERS if a.peers or k not in PEERS}
    for _ in range(a.pairs):
        for k in runs: runs[k].append(spawn(a, k, threads))
    return {k: tuple(median(r[o] for r in v) for o in ('s','mib')) for k,v in runs.items()}

def on(threads): return f'{threads} thread{"s"*(threads>1)}'

def table(res, where):
    (s0,m0),lines = res['plain cross-entropy'],[f'| {where} | s | MiB | time ratio | memory ratio |', '|---|---|---|---|---|']
    return '\n'.join(lines + [f'| {k} | {s:.2f} | {m:.0f} | {s/s0:.2f} | {m/m0:.2f} |' for k,(s,m) in res.items()])

def bars(res, where):
    "Name, value and limit of each bar"
    s0,m0 = res['plain cross-entropy']
    rows = [(f'{k}, {what}', v, lim) for k,lims in BARS.items() for what,v,lim in zip(('time', 'memory'), (res[k][0]/s0, res[k][1]/m0), lims)]
    rows += [(f'{k}{MIXED}, time beyond that without', (res[k+MIXED][0]-res[k][0])/s0, MIXED_BAR) for k in (TOP_K, DENSE, HEAD)]
    rows += [(f'ours to {k}, {what}', h/p, 1.) for k in PEERS if k in res for what,h,p in zip(('time', 'memory'), res[HEAD], res[k])]
    return [(f'{where}, {n}', v, lim) for n,v,lim in rows]

def on_a_gpu(a):
    "The same table at the size of a GPU, or that there is none"
    if not torch.cuda.is_available(): return 'Not run on a GPU: there is none in this machine.'
    b = argparse.Namespace(**vars(a)|GPU)
    how = "Each time is that of a process's second call, memory the peak of what torch has allocated over what it had before; nan where that did not fit."
    return f'On a GPU, {b.tokens:,} tokens, hidden {b.hidden:,}, vocabulary {b.vocab:,}. {how}\n\n' + table(measure(b, 1), torch.cuda.get_device_name())

def machine():
    cpu = re.search(r'model name\s*:\s*(.+)', Path('/proc/cpuinfo').read_text())
    return f"{cpu[1] if cpu else platform.processor()}, {os.cpu_count()} logical cores, {platform.system()}; Python {platform.python_version()}, torch {torch.__version__}"

def section(a, tables):
    what = f'Forward plus backward, {a.tokens:,} tokens, hidden {a.hidden:,}, vocabulary {a.vocab:,}, k = {a.k}, T = {T:g}, fp32.'
    how = f'Medians of {a.pairs} interleaved runs, each in a fresh process. Memory: peak during the call over resident before it, inputs in place (stored targets are inputs).'
    bf16 = re.search(r'\w*bf16', Path('/proc/cpuinfo').read_text())
    low = f'Its instructions for products in bf16: {bf16[0] if bf16 else "none, they are emulated"}.'
    return '\n\n'.join(['## Loss', what + ' ' + how, f'Machine: {machine()}. {low}', *tables])

def write(text):
    "Put a section in place of the one with its title, or at the end"
    old,title = RESULTS.read_text(encoding='utf-8') if RESULTS.exists() else '# Results\n', text.splitlines()[0]+'\n'
    parts = [o for o in re.split(r'(?m)^(?=## )', old) if not o.startswith(title)]
    RESULTS.write_text('\n\n'.join(o.strip() for o in parts + [text]) + '\n', encoding='utf-8')

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for k,v in dict(tokens=2048, hidden=576, vocab=49152, k=50, pairs=5).items(): p.add_argument(f'--{k}', type=int, default=v)
    p.add_argument('--threads', type=int, nargs='+', default=[1, 2])
    p.add_argument('--peers', help='folder that the other packages were installed into')
    p.add_argument('--no-write', action='store_true', help='print only')
    p.add_argument('--quick', action='store_true', help='one run each, on one thread, printed only')
    p.add_argument('--one', choices=CONTENDERS, help=argparse.SUPPRESS)
    p.add_argument('--device', default='cpu', help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.peers: sys.path.append(a.peers)
    if a.one: return one(a)
    if a.quick: a.pairs,a.threads,a.no_write = 1,[1],True
    res = {on(n): measure(a, n) for n in a.threads}
    found = [o for n,r in res.items() for o in bars(r, n)]
    said = '\n'.join(f"BAR {n} {v:.2f} {lim:g} {'ok' if v<=lim else 'short'}" for n,v,lim in found)
    text = section(a, [table(r, n) for n,r in res.items()] + [on_a_gpu(a), f'```\n{said}\n```'])
    print(text)
    if not a.no_write: write(text)
    return 0 if all(v<=lim for _,v,lim in found) else 1

if __name__=='__main__': sys.exit(main())
