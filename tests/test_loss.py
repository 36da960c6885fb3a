"Properties of the losses on shapes and numbers that nobody chose"
import torch, torch.nn.functional as F
from functools import partial
from hypothesis import given, settings, strategies as st
from types import SimpleNamespace

from distill_nb.divergences import Sampled, bucket_kl, jsd, sampled_ce, skew_kl, top_k, tvd
from distill_nb.loss import forward_kl, linear_divergence, reverse_kl
from distill_nb.relations import relation_loss

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
