from __future__ import annotations

import gc
import threading

import pytest

import gratis
from gratis.contract.attach import Scope, attached, check_together
from gratis.contract.card import HELD, Card
from gratis.contract.errors import AttachmentError, StackingError, SubjectError
from gratis.contract.method import Attachable
from gratis.contract.parameters import param


class Subject:
    def __init__(self):
        self.log = []

    def __call__(self, value):
        return value


def _card(**more):
    return Card(title="t", year=2026, acts_on="torch module", free_of=(), **more)


class Tag(Attachable):
    card = _card()
    tag: str = param("tag", help="what is logged")

    def check(self, subject):
        if not isinstance(subject, Subject):
            raise SubjectError("Tag acts on a Subject.")

    def install(self, subject, scope):
        inner = vars(subject).get("call", subject.__class__.__call__)
        scope.set_attribute(subject, "call", lambda s, v: (self.tag, inner(s, v)))
        subject.log.append(f"on {self.tag}")
        scope.defer(lambda: subject.log.append(f"off {self.tag}"))
        return lambda: {"tag": self.tag}


class Other(Tag):
    pass


class Broken(Tag):
    def install(self, subject, scope):
        scope.set_attribute(subject, "half", True)
        raise RuntimeError("broke half-way")


class Holder(Tag):
    card = _card(holds=("kv cache",))


class OtherHolder(Other):
    card = _card(holds=("kv cache",))


def test_block_leaves_no_trace_even_after_an_exception():
    subject = Subject()
    before = set(vars(subject))
    with pytest.raises(ValueError, match="inside"), gratis.attach(subject, Tag()):
        assert "call" in vars(subject)
        raise ValueError("inside")
    assert set(vars(subject)) == before
    assert attached(subject) == ()


def test_order_and_report():
    subject = Subject()
    with gratis.attach(subject, Tag(tag="a"), Other(tag="b")) as handle:
        assert subject.call(subject, 1) == ("b", ("a", 1))
        assert handle(5) == 5
    assert subject.log == ["on a", "on b", "off b", "off a"]
    assert handle.report() == {"test-attach": {"tag": "b"}}


def test_detach_out_of_order_keeps_the_later_one_on():
    subject = Subject()
    first, second = gratis.attach(subject, Tag(tag="a")), gratis.attach(subject, Other(tag="b"))
    first.detach()
    assert subject.call(subject, 1) == ("b", 1)
    assert attached(subject) == (second,)
    first.detach()
    second.detach()
    assert set(vars(subject)) == {"log"}


def test_install_that_fails_is_undone_with_those_before_it():
    subject = Subject()
    with pytest.raises(RuntimeError, match="half-way"):
        gratis.attach(subject, Tag(), Broken())
    assert set(vars(subject)) == {"log"}
    assert attached(subject) == ()


def test_every_method_is_checked_before_any_goes_on():
    subject = Subject()

    class Refuses(Tag):
        def check(self, subject):
            raise SubjectError("no")

    with pytest.raises(SubjectError):
        gratis.attach(subject, Tag(), Refuses())
    assert subject.log == []


def test_twice_is_refused_and_says_so():
    subject = Subject()
    with gratis.attach(subject, Tag()):
        with pytest.raises(AttachmentError, match="already attached"):
            gratis.attach(subject, Tag(tag="again"))
        assert subject.log == ["on tag"]
    with gratis.attach(subject, Tag()):
        pass


def test_stacking_names_both_and_why():
    subject = Subject()
    with gratis.attach(subject, Holder()), pytest.raises((StackingError, AttachmentError), match="cache|already"):
        gratis.attach(subject, OtherHolder())


def test_a_refusal_says_what_either_does_with_what_only_one_can_have():
    class Moves(Holder):
        card = _card(holds=("kv cache",), why={"kv cache": "moves its entries"})

    with pytest.raises(StackingError, match="moves its entries, and test-attach keeps the cache in a way of its own;"):
        check_together([Moves(), OtherHolder()])


def test_what_methods_hold_has_words():
    for entry in gratis.catalogue.entries.values():
        assert set(entry.card.holds) <= set(HELD), entry.name


def test_two_subjects_at_the_same_time():
    one, two = Subject(), Subject()
    with gratis.attach(one, Tag(tag="a")), gratis.attach(two, Tag(tag="b")):
        assert one.call(one, 1) == ("a", 1)
        assert two.call(two, 1) == ("b", 1)


@pytest.mark.parametrize("wrong", [Tag, object(), "lacache", None])
def test_what_is_no_method_is_refused(wrong):
    with pytest.raises(AttachmentError):
        gratis.attach(Subject(), wrong)


def test_nothing_to_attach():
    with pytest.raises(AttachmentError, match="at least one"):
        gratis.attach(Subject())


def test_entering_after_detach():
    handle = gratis.attach(Subject(), Tag())
    handle.detach()
    with pytest.raises(AttachmentError, match="taken off"), handle:
        pass


def test_subjects_are_not_kept_alive():
    subject = Subject()
    gratis.attach(subject, Tag()).detach()
    import weakref

    gone = weakref.ref(subject)
    del subject
    gc.collect()
    assert gone() is None


def test_two_threads_attach_one_after_the_other():
    subject, errors, handles = Subject(), [], []

    def work(method):
        try:
            handles.append(gratis.attach(subject, method))
        except AttachmentError as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(Tag(tag=str(i)),)) for i in range(8)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert len(handles) == 1
    assert len(errors) == 7
    handles[0].detach()
    assert set(vars(subject)) == {"log"}


def test_scope_undoes_in_reverse_and_runs_every_undo():
    scope, seen = Scope(), []
    scope.defer(lambda: seen.append(1))
    scope.defer(lambda: 1 / 0)
    scope.defer(lambda: seen.append(3))
    with pytest.raises(ZeroDivisionError):
        scope.close()
    assert seen == [3, 1]


def test_scope_puts_items_and_attributes_back():
    scope, owner, mapping = Scope(), Subject(), {"a": 1}
    scope.set_item(mapping, "a", 2)
    scope.set_item(mapping, "b", 3)
    scope.set_attribute(owner, "log", "x")
    scope.close()
    assert mapping == {"a": 1}
    assert owner.log == []
