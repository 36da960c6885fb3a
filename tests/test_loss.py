"Properties of the losses on shapes and numbers that nobody chose, and the gradients of two processes"
import os, subprocess, sys, warnings
from functools import partial
from types import SimpleNamespace

import pytest, torch, torch.distributed as dist, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.autograd import gradcheck
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from distill_nb.divergences import Sampled, bucket_kl, jsd, sampled_ce, skew_kl, top_k, tvd
from distill_nb.loss import DistillationLoss, OutputHead, forward_kl, linear_divergence, output_head, reverse_kl
from distill_nb.relations import attention_loss, relation_loss, uld
from distill_nb.student_space import space_divergence, student_space

fast = settings(max_examples=30, deadline=None)
shapes = st.tuples(st.integers(1, 9), st.integers(2, 33), st.integers(0, 999), st.floats(.25, 8.))

def pair(n, v, seed, scale=4.):
    g = torch.Generator().manual_seed(seed)
    return (scale*torch.randn(n, v, generator=g, dtype=torch.float64) for _ in range(2))

@fast
@given(shapes)
def test_kl_agrees_with_torch_and_keeps_its_invariants(s):
    n,v,seed,T = s
    z,zt = pair(n, v, seed)
    kl = forward_kl(z, zt, T)
    want = F.kl_div((z/T).log_softmax(-1), (zt/T).log_softmax(-1), log_target=True, reduction='none').sum(-1)
    assert kl.shape==(n,) and torch.allclose(kl, want, atol=1e-12) and (kl>-1e-12).all()
    assert torch.allclose(forward_kl(zt, zt, T), torch.zeros(n, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(forward_kl(z+3., zt-5., T), kl, atol=1e-9)
    assert torch.allclose(reverse_kl(z, zt, T), forward_kl(zt, z, T))

@fast
@given(shapes, st.integers(1, 12))
def test_chunks_do_not_matter_and_gradients_are_those_of_the_dense_loss(s, chunk):
    n,v,seed,T = s
    g = torch.Generator().manual_seed(seed)
    h,hT = (torch.randn(n, d, generator=g, dtype=torch.float64) for d in (3, 5))
    W,WT = (torch.randn(v+k, d, generator=g, dtype=torch.float64) for k,d in ((2, 3), (0, 5)))
    y = torch.randint(v, (n,), generator=g)
    h.requires_grad_()
    W.requires_grad_()
    heads = [SimpleNamespace(weight=w, bias=None) for w in (W, WT)]
    got = linear_divergence(h, heads[0], (hT, heads[1]), T, y, kl=.7, ce=.3, chunk=chunk)
    z,zt = (h@W.T)[:,:v],hT@WT.T
    want = .7*T**2*forward_kl(z, zt, T).sum() + .3*F.cross_entropy(z, y, reduction='sum')
    assert torch.allclose(got.loss, want, atol=1e-9)
    for a,b in zip(torch.autograd.grad(got.loss, (h, W)), torch.autograd.grad(want, (h, W))): assert a.shape==b.shape and torch.allclose(a, b, atol=1e-9)
    assert torch.equal(got.agree, z.argmax(-1)==zt.argmax(-1))

dials = st.one_of(st.just(reverse_kl), st.just(tvd), st.floats(0., 1.).map(lambda b: partial(jsd, beta=b)),
    st.tuples(st.floats(0., .9), st.booleans()).map(lambda o: partial(skew_kl, lam=o[0], reverse=o[1])))

def heads_and_states(n, v, g):
    "Student states, its padded head, teacher states and head"
    h,hT = (torch.randn(n, d, generator=g, dtype=torch.float64) for d in (3, 5))
    W,WT = (torch.randn(v+k, d, generator=g, dtype=torch.float64) for k,d in ((2, 3), (0, 5)))
    return h.requires_grad_(),W.requires_grad_(),hT,WT

def bare(W): return SimpleNamespace(weight=W, bias=None)

def same(got, want, args):
    "Loss and gradients"
    assert torch.allclose(got, want, atol=1e-9)
    for a,b in zip(torch.autograd.grad(got, args), torch.autograd.grad(want, args)): assert a.shape==b.shape and torch.allclose(a, b, atol=1e-9)

@fast
@given(shapes, st.integers(1, 12), dials, st.booleans(), st.booleans())
def test_every_divergence_in_chunks_is_the_dense_one(s, chunk, f, stored, per_token):
    n,v,seed,T = s
    g = torch.Generator().manual_seed(seed)
    h,W,hT,WT = heads_and_states(n, v, g)
    if per_token: T = T*(.5 + torch.rand(n, generator=g, dtype=torch.float64))
    z,zt,y = (h@W.T)[:,:v],hT@WT.T,torch.randint(v, (n,), generator=g)
    got = linear_divergence(h, bare(W), zt if stored else (hT, bare(WT)), T, y, kl=.7, ce=.3, chunk=chunk, divergence=f)
    assert torch.allclose(got.kl, forward_kl(z, zt, T), atol=1e-9)
    same(got.loss, .7*(T**2*f(z, zt, T)).sum() + .3*F.cross_entropy(z, y, reduction='sum'), (h, W))

@fast
@given(shapes, st.integers(1, 12), st.integers(1, 33))
def test_sparse_targets_in_chunks_are_the_dense_ones(s, chunk, k):
    n,v,seed,T = s
    g = torch.Generator().manual_seed(seed)
    h,W,hT,WT = heads_and_states(n, v, g)
    zt = hT@WT.T
    kept = top_k(zt, min(k, v), T)
    assert (bucket_kl(h@W.T, kept, T)<=forward_kl((h@W.T)[:,:v], zt, T)+1e-9).all()
    same(linear_divergence(h, bare(W), kept, T, chunk=chunk).loss, T**2*bucket_kl(h@W.T, kept, T).sum(), (h, W))
    lots = Sampled(torch.randint(v, (n, k), generator=g), torch.rand(n, k, generator=g, dtype=torch.float64)/k, v)
    same(linear_divergence(h, bare(W), lots, chunk=chunk).loss, sampled_ce(h@W.T, lots).sum(), (h, W))

@fast
@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 999))
def test_relations_are_blind_to_rotations_and_see_no_padding(B, L, R, s, t, seed):
    g = torch.Generator().manual_seed(seed)
    a,b = (torch.randn(B, L, R*d, generator=g, dtype=torch.float64) for d in (s, t))
    mask = torch.rand(B, L, generator=g)<.7
    mask[:,-1] = True
    got = relation_loss(a, b, R, mask)
    turn = torch.linalg.qr(torch.randn(s, s, generator=g, dtype=torch.float64))[0]
    assert got.shape==(B, L) and (got>-1e-12).all() and (got[~mask]==0).all()
    assert torch.allclose(relation_loss((a.view(B, L, R, s)@turn).flatten(2), b, R, mask), got, atol=1e-9)
    assert torch.allclose(relation_loss(a.where(mask[...,None], 7.), b, R, mask), got, atol=1e-9)
    assert torch.allclose(relation_loss(b, b, R, mask), torch.zeros(B, L, dtype=torch.float64), atol=1e-12)

@fast
@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 999))
def test_relations_are_those_of_a_loop_over_texts_and_heads(B, L, R, s, t, seed):
    g = torch.Generator().manual_seed(seed)
    a,b = (torch.randn(B, L, R*d, generator=g, dtype=torch.float64) for d in (s, t))
    a.requires_grad_()
    mask = torch.rand(B, L, generator=g)<.7
    mask[:,0] = True
    def table(x, i, r, d): return (x := x[i][mask[i]][:,r*d:(r+1)*d])@x.T/d**.5
    def row(i): return sum(F.kl_div(table(a, i, r, s).log_softmax(-1), table(b, i, r, t).softmax(-1), reduction='none').sum(-1) for r in range(R))/R
    same(relation_loss(a, b, R, mask).sum(), sum(row(i).sum() for i in range(B)), (a,))

@fast
@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 4), st.integers(1, 4), st.integers(0, 999))
def test_attention_is_compared_row_by_row_in_the_mean_over_heads(B, L, heads_s, heads_t, seed):
    g = torch.Generator().manual_seed(seed)
    above = torch.ones(L, L, dtype=torch.bool).triu(1)
    a,b = (torch.randn(B, h, L, L, generator=g, dtype=torch.float64) for h in (heads_s, heads_t))
    a.requires_grad_()
    p,again,t = (o.masked_fill(above, -torch.inf).softmax(-1) for o in (a,a,b))
    got = attention_loss(again, t)
    assert got.shape==(B, L) and (got>-1e-12).all() and got[:,0].abs().max()<1e-12
    want = sum((t[i,:,j,:j+1].mean(0)*(t[i,:,j,:j+1].mean(0)/p[i,:,j,:j+1].mean(0)).log()).sum() for i in range(B) for j in range(L))
    same(got.sum(), want, (a,))
    for o in (attention_loss(p.flip(1), t), attention_loss(p.mean(1), t), attention_loss(p, t.mean(1))): assert torch.allclose(o, got, atol=1e-12)
    assert torch.allclose(attention_loss(t.roll(1, 1), t), torch.zeros(B, L, dtype=torch.float64), atol=1e-12)

@fast
@given(shapes, st.integers(-8, 8), st.booleans())
def test_uld_compares_shapes_and_no_words(s, more, per_token):
    n,v,seed,T = s
    (z,_),(zt,_) = pair(n, v, seed),pair(n, max(1, v+more), seed+1)
    z.requires_grad_()
    g = torch.Generator().manual_seed(seed)
    if per_token: T = T*(.5 + torch.rand(n, generator=g, dtype=torch.float64))
    got,col = uld(z, zt, T),T[:,None] if per_token else T
    (p,i),t = (z/col).softmax(-1).sort(-1),(zt/col).softmax(-1).sort(-1)[0]
    m = max(v, zt.shape[-1])
    gap = F.pad(p, (m-v, 0)) - F.pad(t, (m-zt.shape[-1], 0))
    assert got.shape==(n,) and torch.allclose(got, gap.abs().sum(-1), atol=1e-12) and (got<=2+1e-12).all()
    sign = torch.empty_like(p).scatter(-1, i, gap[:,m-v:].sign())
    p = (z/col).softmax(-1)
    assert torch.allclose(torch.autograd.grad(got.sum(), z)[0], p*(sign - (p*sign).sum(-1, keepdim=True))/col, atol=1e-9)
    assert torch.allclose(uld(z[:,torch.randperm(v, generator=g)] + 3., zt - 5., T), got, atol=1e-9) and torch.allclose(uld(zt, z.detach(), T), got, atol=1e-12)
    assert torch.allclose(uld(F.pad(zt, (0, 3), value=-torch.inf), zt, T), torch.zeros(n, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(DistillationLoss(T, divergence='uld')(z, zt), (T**2*got).mean(), atol=1e-9)

@fast
@given(shapes, st.integers(1, 12), st.integers(-1, 3), st.booleans(), st.floats(.25, 4.))
def test_student_space_is_forward_kl_for_a_head_that_does_not_train(s, chunk, more, bias, scale):
    n,v,seed,T = s
    g = torch.Generator().manual_seed(seed)
    h,W,hT,_ = heads_and_states(n, v, g)
    head = OutputHead(W.detach(), torch.randn(len(W), generator=g, dtype=torch.float64) if bias else None, scale)
    zt = hT@torch.randn(max(1, v+more), 5, generator=g, dtype=torch.float64).T
    m = min(len(W), zt.shape[-1])
    z,y = scale*F.linear(h, W.detach(), head.bias)[:,:m],torch.randint(m, (n,), generator=g)
    target = student_space(zt, head, T)
    assert target.mean.shape==h.shape and target.offset.shape==(n,) and target.vocab==m
    got,kl = space_divergence(h, head, target, T, y, kl=.7, ce=.3, chunk=chunk),forward_kl(z, zt[:,:m], T)
    assert torch.allclose(got.kl, kl, atol=1e-9) and torch.equal(got.agree, z.argmax(-1)==zt[:,:m].argmax(-1))
    assert torch.allclose(got.ce, F.cross_entropy(z, y, reduction='none'), atol=1e-9)
    same(got.loss, .7*T**2*kl.sum() + .3*F.cross_entropy(z, y, reduction='sum'), (h,))

@fast
@given(shapes, st.integers(1, 12), dials)
def test_the_textbook_call_at_a_temperature_for_each_position_is_the_chunked_one(s, chunk, f):
    "The one leaves out what is not a target, the other is not given it"
    n,v,seed,T = s
    g = torch.Generator().manual_seed(seed)
    h,W,hT,WT = heads_and_states(2*n, v, g)
    T = T*(.5 + torch.rand(2, n, generator=g, dtype=torch.float64))
    y = torch.randint(v, (2, n), generator=g).masked_fill(torch.rand(2, n, generator=g)<.4, -100)
    m = (y!=-100).flatten()
    whole = DistillationLoss(T, divergence=f, ce=.3)((h@W.T).view(2, n, -1), (hT@WT.T).view(2, n, -1), labels=y)
    part = linear_divergence(h[m], bare(W), (hT[m],bare(WT)), T.flatten()[m], y.flatten()[m], ce=.3, chunk=chunk, divergence=f)
    same(whole, part.loss/max(1, m.sum()), (h, W))

@fast
@given(shapes, st.sampled_from((-100, -1, 0, 99)))
def test_a_label_that_is_no_word_of_both_is_refused(s, more):
    n,v,seed,T = s
    h,W,hT,WT = heads_and_states(n, v, torch.Generator().manual_seed(seed))
    y = torch.zeros(n, dtype=torch.int64)
    y[seed%n] = more if more<0 else v+more
    with pytest.raises(ValueError, match='one tokenizer' if more>=0 else 'Pass target positions only'): linear_divergence(h, bare(W), (hT,bare(WT)), T, y, ce=.3)

# Finite differences, for every divergence and kind of target

DIVERGENCES = dict(forward=forward_kl, reverse=reverse_kl, tvd=tvd, skew=skew_kl, skew_back=partial(skew_kl, reverse=True))
DIVERGENCES |= {f'jsd {b}': partial(jsd, beta=b) for b in (0, .1, .5, 1)}

def pieces(seed=0, n=4, v=9):
    "What a call needs: states, weight and bias that train, and every kind of target"
    g = torch.Generator().manual_seed(seed)
    h,W,hT,WT = heads_and_states(n, v, g)
    b,zt,T = torch.randn(v+2, generator=g, dtype=torch.float64).requires_grad_(),hT@WT.T,.5 + torch.rand(n, generator=g, dtype=torch.float64)
    lots = Sampled(torch.randint(v, (n, 3), generator=g), torch.rand(n, 3, generator=g, dtype=torch.float64)/3, v)
    dense,sparse = dict(head=(hT,bare(WT)), bent=(hT,OutputHead(WT, None, 2., 5.)), logits=zt),dict(top_k=top_k(zt, 3, T), sampled=lots)
    return (h,W,b),dense,sparse,T,torch.randint(v, (n,), generator=g)

@pytest.mark.parametrize('kind', ('head', 'bent', 'logits'))
@pytest.mark.parametrize('name', DIVERGENCES)
def test_finite_differences(name, kind):
    args,dense,_,T,y = pieces()
    def f(h, W, b): return linear_divergence(h, OutputHead(W, b, .7, 4.), dense[kind], T, y, kl=.7, ce=.3, chunk=3, divergence=DIVERGENCES[name]).loss
    assert gradcheck(f, args)

@pytest.mark.parametrize('kind', ('top_k', 'sampled'))
def test_finite_differences_of_sparse_targets(kind):
    args,_,sparse,T,y = pieces()
    def f(h, W, b): return linear_divergence(h, OutputHead(W, b, .7, 4.), sparse[kind], T if kind=='top_k' else 1., y, kl=.7, ce=.3, chunk=3).loss
    assert gradcheck(f, args)

# Heads

@fast
@given(shapes, st.integers(1, 12), dials, st.integers(-1, 3))
def test_a_frozen_head_and_one_of_more_or_fewer_ids(s, chunk, f, more):
    n,v,seed,T = s
    g = torch.Generator().manual_seed(seed)
    h,W,hT,_ = heads_and_states(n, v, g)
    WT = torch.randn(max(1, v+more), 5, generator=g, dtype=torch.float64)
    m = min(len(W), len(WT))
    want = T**2*f((h@W.T)[:,:m], (hT@WT.T)[:,:m], T).sum()
    same(linear_divergence(h, bare(W), (hT,bare(WT)), T, chunk=chunk, divergence=f).loss, want, (h, W))
    frozen = linear_divergence(h, bare(W.detach()), (hT,bare(WT)), T, chunk=chunk, divergence=f).loss
    same(frozen, T**2*f((h@W.detach().T)[:,:m], (hT@WT.T)[:,:m], T).sum(), (h,))

@fast
@given(shapes, st.integers(1, 12), dials)
def test_a_tied_head_and_a_slice_of_one(s, chunk, f):
    n,v,seed,T = s
    g = torch.Generator().manual_seed(seed)
    _,_,hT,WT = heads_and_states(n, v, g)
    E,ids = torch.randn(v+2, 3, generator=g, dtype=torch.float64).requires_grad_(),torch.randint(v, (n,), generator=g)
    for part in (E,E[:v]):
        want = T**2*f((E[ids]@E.T)[:,:v], hT@WT.T, T).sum()
        same(linear_divergence(E[ids], bare(part), (hT,bare(WT)), T, chunk=chunk, divergence=f).loss, want, (E,))

def lora(start=0., **kw):
    "A tiny model with an adapter of rank 4 at its head"
    torch.manual_seed(0)
    m = LlamaForCausalLM(LlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)).double()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        m = get_peft_model(m, LoraConfig(r=4, task_type='CAUSAL_LM', **kw))
    for k,p in m.named_parameters():
        if 'lora_B' in k: nn.init.normal_(p, std=start)
    return m

def through_model(m, ids, zt):
    "States before the head, and the loss by way of the model's own logits"
    seen = []
    handle = m.get_output_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    z = m(input_ids=ids).logits[0]
    handle.remove()
    return seen[0][0],4*forward_kl(z, zt, 2.).sum()

def trained(m): return [p for p in m.parameters() if p.requires_grad]

@pytest.mark.parametrize('kw', (dict(target_modules=['q_proj']), dict(target_modules=['q_proj'], modules_to_save=['lm_head'])))
def test_adapters_below_the_head(kw):
    "The head is left alone, or trained whole beside them"
    m,ids,(_,zt) = lora(.3, **kw),torch.arange(7)[None],pair(7, 40, 0)
    (h,_),(_,want) = (through_model(m, ids, zt) for _ in range(2))
    same(linear_divergence(h, output_head(m), zt, 2., chunk=3).loss, want, trained(m))

@pytest.mark.parametrize('std', [0., .3], ids=['new', 'trained'])
def test_an_adapter_at_the_head_trains_and_no_gradient_is_as_large_as_the_head(std):
    "W + s B A is never made, and A and B have the gradients that the model would give them"
    m,ids,(_,zt) = lora(std, target_modules=['lm_head']),torch.arange(7)[None],pair(7, 40, 0)
    (h,_),(_,want) = (through_model(m, ids, zt) for _ in range(2))
    head = output_head(m)
    assert len(trained(m))==2 and not head.weight.requires_grad and all(a is b for a,b in zip(head.lora[:2], trained(m)))
    for bend in ({}, dict(scale=.7, softcap=4.)):
        A,B,s = head.lora
        z = h@(head.weight + s*B@A).T
        if bend: want = 4*forward_kl(4*(.7*z/4).tanh(), zt, 2.).sum()
        same(linear_divergence(h, head._replace(**bend), zt, 2., chunk=3).loss, want, trained(m))

def test_finite_differences_of_an_adapter_and_a_cut_vocabulary():
    (h,W,b),dense,_,T,y = pieces()
    A,B = (torch.randn(*o, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_() for o in ((2, 3), (11, 2)))
    def f(h, W, b, A, B): return linear_divergence(h, OutputHead(W, b, .7, 4., (A,B,.5)), dense['head'], T, y, kl=.7, ce=.3, chunk=3).loss
    assert gradcheck(f, (h, W, b, A, B))

@pytest.mark.parametrize('kw', [dict(use_dora=True), dict(lora_dropout=.1), dict(lora_bias=True)], ids=lambda o: next(iter(o)))
def test_an_adapter_that_adds_something_else_is_refused(kw):
    with pytest.raises(ValueError, match='has an adapter'): output_head(lora(target_modules=['lm_head'], **kw))

# Two processes

class Student(nn.Module):
    "A student small enough to see through, whose forward is the loss"
    def __init__(self, tied):
        super().__init__()
        self.emb,self.body,self.head = nn.Embedding(30, 8),nn.Linear(8, 8),nn.Linear(8, 30, bias=not tied)
        if tied: self.head.weight = self.emb.weight

    def forward(self, ids, target, T, **kw): return linear_divergence(self.body(self.emb(ids)), self.head, target, T, ids, kl=.7, ce=.3, chunk=3, **kw).loss

def grads_of(how, tied, f, rank, world):
    "Gradients of the mean over nine tokens, of which each process has its part: 7 and 2, or 9 and none"
    torch.manual_seed(0)
    m = Student(tied).double()
    ids,hT,WT = torch.randint(30, (9,)),torch.randn(9, 5, dtype=torch.float64),torch.randn(30, 5, dtype=torch.float64)
    if how=='ddp': m = DistributedDataParallel(m)
    if how=='fsdp': fully_shard(m, mesh=dist.init_device_mesh('cpu', (world,)))
    res = []
    for cut in (7,9):
        r = slice(9) if world==1 else (slice(cut), slice(cut, 9))[rank]
        m.zero_grad()
        (m(ids[r], (hT[r],bare(WT)), 2., divergence=f)*world/9).backward()
        res += [getattr(p.grad, 'full_tensor', lambda g=p.grad: g)() for p in m.parameters()]
    return [o.detach().clone() for o in res]

def cases(): return [(how, tied, f) for how in ('ddp', 'fsdp') for tied in (False, True) for f in ('forward_kl', jsd)]

def child(out):
    "One of the processes that torchrun starts"
    dist.init_process_group('gloo')
    res = {f'{i}.{j}': g for i,o in enumerate(cases()) for j,g in enumerate(grads_of(*o, dist.get_rank(), 2))}
    if dist.get_rank()==0: save_file(res, out)
    dist.destroy_process_group()

@pytest.fixture(scope='module')
def together(tmp_path_factory):
    out = tmp_path_factory.mktemp('two')/'grads.safetensors'
    run = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', __file__, str(out)]
    subprocess.run(run, check=True, env=os.environ|dict(OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES=''))
    return load_file(out)

@pytest.mark.parametrize('i', range(len(cases())), ids=['-'.join((how, 'tied' if tied else 'untied', getattr(f, '__name__', f))) for how,tied,f in cases()])
def test_two_processes_have_the_gradients_of_one(i, together):
    alone = grads_of('alone', *cases()[i][1:], 0, 1)
    assert f'{i}.{len(alone)}' not in together and all(o.abs().max()>0 for o in alone)
    for j,o in enumerate(alone): assert o.shape==(t := together[f'{i}.{j}']).shape and torch.allclose(o, t, atol=1e-12)

if __name__=='__main__': child(sys.argv[1])
