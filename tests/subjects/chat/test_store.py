"""The cache of answers, transcripts and their replay."""

from __future__ import annotations

import multiprocessing
import sqlite3
import time

import pytest

from gratis.contract.errors import FileError
from gratis.subjects.chat import Chat, ChatError, Request
from gratis.subjects.chat.store import ResponseCache


def counting():
    calls = []

    def answer(messages, **parameters):
        calls.append((messages, parameters))
        return f"{len(calls)}"

    return calls, answer


def test_cache_keys_hold_everything_that_the_answer_depends_on(tmp_path):
    calls, answer = counting()
    path = tmp_path / "cache.sqlite"
    made = Chat(answer, cache=path)
    base = Request(messages=({"role": "user", "content": "q"},))
    assert made(base)[0].text == "1"
    assert made(base)[0].cached
    assert Chat(answer, cache=path)(base)[0].cached
    assert len(calls) == 1
    for change in ({"max_tokens": 9}, {"stop": ("x",)}, {"seed": 3}, {"sample_index": 1}, {"top_p": 0.5},
                   {"messages": ({"role": "user", "content": "r"},)}, {"choices": ("1", "2")}):  # fmt: skip
        assert not made(Request(**{**vars(base), **change}))[0].cached
    sampled = Request(messages=base.messages, temperature=1.0)
    assert not made(sampled)[0].cached
    assert not made(sampled)[0].cached
    first = Request(messages=base.messages, temperature=1.0, sample_index=1)
    assert made(first)[0].text == made(first)[0].text
    stats = made.stats()
    assert stats["cached"] == 2
    assert stats["cost"] is None


def test_failed_answers_are_not_cached(tmp_path):
    def fails(messages, **parameters):
        raise ChatError("down")

    made = Chat(fails, cache=tmp_path / "c.sqlite")
    assert made("q")[0].error == "down"
    assert not made("q")[0].cached


def _write_forever(path, transcript):
    made = Chat(lambda messages, **p: "x" * 20_000, cache=path, transcript=transcript)
    for number in range(100_000):
        made(f"question {number}")


def test_a_kill_during_a_write_leaves_what_was_written_before(tmp_path):
    path, transcript = tmp_path / "c.sqlite", tmp_path / "run.jsonl"
    worker = multiprocessing.get_context("fork").Process(target=_write_forever, args=(path, transcript))
    worker.start()
    while not transcript.exists() or transcript.stat().st_size < 1_000_000:
        time.sleep(0.01)
    worker.kill()
    worker.join()
    calls, answer = counting()
    made = Chat(answer, cache=path, transcript=transcript)
    assert all(r.cached and len(r.text) == 20_000 for r in made([f"question {n}" for n in range(20)]))
    assert not calls
    assert Chat.replay(transcript)("question 0")[0].text == "x" * 20_000


def test_a_damaged_cache_is_refused(tmp_path):
    path = tmp_path / "c.sqlite"
    path.write_bytes(b"this is no database" * 100)
    with pytest.raises(FileError, match="cannot be used"):
        Chat(lambda m, **p: "", cache=path)
    _, answer = counting()
    good = tmp_path / "good.sqlite"
    made = Chat(answer, cache=good)
    made("q")
    for damage in ("{", "[]", '{"text": "x"}'):
        with sqlite3.connect(good) as connection:
            connection.execute("UPDATE replies SET reply = ?", (damage,))
        with pytest.raises(FileError, match="damaged"):
            made("q")
    made._cache._connection.execute("DROP TABLE replies")
    with pytest.raises(FileError, match="damaged"):
        made("q")
    with pytest.raises(FileError, match="cannot be written"):
        made._cache.put("key", made(Request(messages=({"role": "user", "content": "r"},), temperature=1.0))[0])


def _write(path, start):
    from gratis.subjects.chat import Reply

    cache = ResponseCache(path)
    for i in range(start, start + 25):
        cache.put(f"k{i}", Reply(text=str(i)))
    cache.close()


def test_several_processes_write_one_cache(tmp_path):
    path = tmp_path / "c.sqlite"
    ResponseCache(path).close()
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_write, args=(path, 25 * i)) for i in range(4)]
    [w.start() for w in workers]
    [w.join() for w in workers]
    cache = ResponseCache(path)
    assert [cache.get(f"k{i}").text for i in range(100)] == [str(i) for i in range(100)]


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileError, match="cannot be used"):
        Chat(lambda m, **p: "", cache=tmp_path / "file" / "c.sqlite")


def test_the_same_request_twice_in_a_batch_is_sent_once():
    calls, answer = counting()
    assert [a.text for a in Chat(answer)(["q", "r", "q"])] == ["1", "2", "1"]
    assert len(calls) == 2


def test_replay_repeats_a_run_and_names_what_is_missing(tmp_path):
    _, answer = counting()
    path = tmp_path / "run.jsonl"
    recorded = [a.text for a in Chat(answer, transcript=path)(["a", "b"])]
    assert [a.text for a in Chat.replay(path)(["a", "b"])] == recorded
    with pytest.raises(ChatError, match=r'not in the transcript.*"content": "c"'):
        Chat.replay(path)("c")
    path.write_text(path.read_text().splitlines()[0] + "\n")
    with pytest.raises(ChatError, match="not in the transcript"):
        Chat.replay(path)("b")
    path.write_text("{broken\n")
    with pytest.raises(FileError, match="Line 1"):
        Chat.replay(path)
    path.write_bytes(b"\xff\xfe\n")
    with pytest.raises(FileError, match="damaged"):
        Chat.replay(path)


@pytest.mark.parametrize("cut", [1, 40, 300])
def test_a_line_that_a_killed_run_left_unfinished_is_left_out(tmp_path, cut):
    _, answer = counting()
    path = tmp_path / "run.jsonl"
    Chat(answer, transcript=path)(["a", "b"])
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    assert Chat.replay(path)("a")[0].text == "1"
    if cut > 1:
        with pytest.raises(ChatError, match="not in the transcript"):
            Chat.replay(path)("b")
    made = Chat(answer, transcript=path)
    made("c")
    assert path.read_bytes().startswith(whole.splitlines(keepends=True)[0])
    assert len(Chat.replay(path)(["a", "c"])) == 2
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileError, match="cannot be written"):
        Chat(answer, transcript=tmp_path / "file" / "run.jsonl")


def test_sec_replays_byte_for_byte(tmp_path):
    import gratis
    from tests.tiny_chat import scripted

    path = tmp_path / "run.jsonl"
    results = []
    for made in (Chat(scripted, transcript=path), None):
        made = made or Chat.replay(path)
        with gratis.attach(made, gratis.SEC(shots=2)):
            results.append(repr(made.answer_many(["What is 2 plus 3?", "What is 8 plus 8?"], "number")))
    assert results[0] == results[1]
