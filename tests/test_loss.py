"Properties of the losses on shapes and numbers that nobody chose"
import torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from types import SimpleNamespace

from distill_nb.loss import forward_kl, linear_divergence, reverse_kl

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
