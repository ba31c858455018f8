"""Pins the values of the named schedules and shapes against their formulas, and what they refuse, in which words."""
from functools import partial
import numpy as np, pytest
from fastai.callback.schedule import SchedCos, SchedExp, SchedLin, SchedPoly
from fastai_embdrop.schedules import SchedCurriculum, SchedEarly, SchedLate, SchedPiecewise, shapes
from fastai_embdrop.schedules import _check_sched, _check_shape, _eval_sched

pcts = np.linspace(0, 1, 121) # 1/3 and 1/2 are among them

def golden(sched): return [round(sched(pct), 6) for pct in (0, .25, .5, .75, 1)]

def test_named_schedules_golden_values():
    assert golden(SchedEarly(.4, .5))==[.4, .2, 0, 0, 0]
    assert golden(SchedLate(.2, .5))==[0, 0, .2, .2, .2]
    assert golden(SchedCurriculum(.4, 4))==[0, .252848, .345866, .380085, .392674]
    assert golden(SchedCurriculum(.4, .5))==[0, .047001, .08848, .125084, .157388]
    assert golden(SchedPiecewise([(0,0), (.25,.5), (1,.2)]))==[0, .5, .4, .3, .2]

def test_curriculum_is_morerios():
    keep = lambda t, theta, gamma: (1-theta)*np.exp(-gamma*t)+theta
    assert all(abs(1-SchedCurriculum(.3, 5)(t)-keep(t, .7, 5))<1e-12 for t in np.linspace(0, 1, 11))

@pytest.mark.parametrize('sched,args,msg', [
    (SchedEarly, (1.2,.5), 'p=1.2'), (SchedEarly, (.2,0), 'until=0'), (SchedEarly, (.2,2), 'until=2'),
    (SchedLate, (.2,-1), 'after=-1'), (SchedLate, (2,.5), 'p=2'), (SchedCurriculum, (.4,0), 'gamma=0'),
    (SchedCurriculum, (.4,-1), 'gamma=-1'), (SchedCurriculum, (.4,float('nan')), 'gamma=nan'),
    (SchedCurriculum, (.4,float('inf')), 'gamma=inf'), (SchedCurriculum, (-1,1), 'p=-1')])
def test_named_schedules_refuse(sched, args, msg):
    with pytest.raises(ValueError, match=msg): sched(*args)

@pytest.mark.parametrize('points,msg', [
    ([], 'from 0 to 1'), ([0,1], 'pairs'), ([(0,1.1),(1,0)], 'p=1.1'), ([(0,.1),(.5,0),(.5,.1),(1,0)], 'rise'),
    ([(0,.1),(.5,0),(.3,.1),(1,0)], 'rise'), ([(0,.1)], 'from 0 to 1'), ([(.1,.1),(1,0)], 'from 0 to 1'),
    ([(-.1,.1),(1,0)], 'from 0 to 1'), ([(0,.1),(1.1,0)], 'from 0 to 1'), ([(.1,.1),(.9,0)], r'\[0.1, 0.9\]')])
def test_piecewise_refuses(points, msg):
    with pytest.raises(ValueError, match=msg): SchedPiecewise(points)

def test_a_value_is_checked_with_the_largest_factor():
    f = SchedLin(2, 0)
    assert (_eval_sched(f, .5), _eval_sched(f, 0, most=.5), _eval_sched(f, .1, most=.5))==(1, 2, 1.8)
    with pytest.raises(ValueError, match="schedule of 'p' at pct=0: p=2"): _eval_sched(f, 0, 'p')
    with pytest.raises(ValueError, match="schedule of 'p' at pct=0: p=1.2"): _eval_sched(f, 0, 'p', .6)

# what is left of the way from start to end
left = dict(cos=lambda x: (1+np.cos(np.pi*x))/2, lin=lambda x: 1-x, poly=lambda x: 1-x**2, const=lambda x: 1.,
            early=lambda x: max(0, 1-3*x), late=lambda x: float(x<.5), curriculum=lambda x: np.exp(-10*x))

@pytest.mark.parametrize('start,end', [(.5,.05), (.05,.5), (0,.4), (3,0)])
@pytest.mark.parametrize('name', left)
def test_shapes_go_from_start_to_end(name, start, end):
    want = [end + (start-end)*left[name](x) for x in pcts]
    np.testing.assert_allclose([shapes[name](start, end)(x) for x in pcts], want, atol=1e-9)

def test_every_shape_is_tried_above(): assert {*left, 'exp'}=={*shapes}

@pytest.mark.parametrize('start,end', [(.5,.05), (.05,.5)])
def test_exp_is_a_straight_line_of_logarithms(start, end):
    logs = np.log([shapes['exp'](start, end)(x) for x in pcts])
    np.testing.assert_allclose(np.diff(logs), np.log(end/start)/120)

@pytest.mark.parametrize('name', shapes)
def test_shapes_are_no_schedules_of_another_meaning(name): assert _check_shape(shapes[name]) is shapes[name]

not_shapes = [(SchedEarly, "shapes['early']"), (SchedLate, "shapes['late']"), (SchedPiecewise, 'SchedCos'),
              (SchedCurriculum, "shapes['curriculum']"), (SchedPoly, "shapes['poly']"), ('cos', "shapes['cos']"),
              ('cosine', 'SchedCos'), (None, 'SchedCos'), (.5, 'SchedCos'), (SchedCos(.5, .1), 'SchedCos'),
              (SchedEarly(.5, .1), 'SchedCos'), (max, 'SchedCos')]

@pytest.mark.parametrize('sched,right', not_shapes)
def test_a_shape_takes_a_start_and_an_end(sched, right):
    with pytest.raises(ValueError) as e: _check_shape(sched)
    assert str(e.value).startswith(f"sched={getattr(sched, '__name__', repr(sched))}: ")
    assert str(e.value).endswith(f"use sched={right}, or DropoutScheduler({{'embed_p': ...}}) for a schedule")

@pytest.mark.parametrize('start,end', [(.5,0), (0,.5), (0,0.)])
def test_exp_needs_ends_above_0(start, end):
    with pytest.raises(ValueError, match=rf"schedule of 'p': SchedExp\({start}, {end}\) .* use SchedCos or SchedLin"):
        _check_sched(SchedExp(start, end), 'p')

@pytest.mark.parametrize('sched', [SchedExp(.5, .05), SchedCos(.5, 0), SchedEarly(.5, .3), partial(max, 0)])
def test_other_schedules_pass(sched): assert _check_sched(sched) is sched
