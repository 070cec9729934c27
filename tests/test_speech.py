"Speech: a gapless timeline that fits the wave, the same twice, and a refusal of what cannot be spoken."
import hashlib
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nofa_nb.core.errors import InputError, MissingResource
from nofa_nb.world import speech as module
from nofa_nb.world.speech import (
    DURATION,
    SYMBOLS,
    VOICE_RATE,
    VOWELS,
    accent,
    from_ipa,
    number_words,
    sentences,
    speak,
    spell,
    synthesize,
    timeline,
    tokens,
)

LETTERS = "abcdefghijklmnopqrstuvwxyzAEIOUTHNG' ,.?!-0123456789$%éß\n"
needs_espeak = pytest.mark.skipif(module.espeak_library() is None, reason="espeak-ng is not installed")


def check_timeline(speech):
    "No gaps, known names, from 0 to the end of the wave."
    line = speech.phonemes
    assert line[0].start == 0 and line[-1].end == pytest.approx(len(speech.wave) / speech.rate, abs=1e-9)
    assert all(a.end == b.start and a.end > a.start for a, b in zip(line, line[1:]))
    assert {p.symbol for p in line} <= set(SYMBOLS) and all(p.symbol in VOWELS for p in line if p.stress)
    assert speech.wave.dtype == np.float32 and np.abs(speech.wave).max() <= 1


@pytest.mark.parametrize("engine", ["builtin", pytest.param("espeak", marks=needs_espeak)])
def test_an_engine_says_the_same_twice(engine):
    one, two = (speak("Bob's happy mother bought five fish, didn't she?", engine=engine, seed=3) for _ in range(2))
    check_timeline(one)
    assert one.engine == engine and one.phonemes == two.phonemes and np.array_equal(one.wave, two.wave)
    assert [p.symbol for p in one.phonemes if p.symbol in "bmp"] == ["b", "b", "p", "m", "b"]
    assert len(one.phrases) == 2 and len(one.beats) >= 5
    quiet = [p for p in one.phonemes if p.symbol == "sil"]
    level = lambda p: np.sqrt(np.mean(one.wave[round(p.start * one.rate):round(p.end * one.rate)] ** 2))
    assert level(quiet[-1]) < .2 * np.mean([level(p) for p in one.phonemes if p.stress])


@settings(max_examples=15, deadline=None)
@given(st.text(st.sampled_from(LETTERS), min_size=1, max_size=80), st.integers(0, 99))
def test_any_text_is_spoken_or_refused(text, seed):
    try:
        speech = speak(text, engine="builtin", seed=seed)
    except InputError:
        assert not [t for t in tokens(text) if t.isalpha()]
        return
    check_timeline(speech)


@settings(max_examples=100, deadline=None)
@given(st.from_regex(r"[a-z]{1,14}('s|'ll|n't)?", fullmatch=True))
def test_every_word_has_sounds(word):
    sounds = spell(word)
    assert set(sounds) <= set(DURATION) and (sounds or not word.replace("h", "").replace("e", ""))


def test_the_builtin_timeline_is_the_same_on_every_machine():
    line, marks = timeline("The quick brown fox paid 42 dollars; why not?", seed=11)
    said = " ".join(f"{p.symbol}{'*' * p.stress}:{p.start:.3f}" for p in line)
    assert marks == ",?" and hashlib.sha256(said.encode()).hexdigest()[:16] == "fe475cecda9129f5", said


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999_999_999))
def test_numbers_are_read_back(n):
    value = {w: i for i, w in enumerate(module._ONES)} | {w: 10 * i for i, w in enumerate(module._TENS) if w != "_"}
    total = part = 0
    for word in number_words(n).split():
        if word == "hundred":
            part *= 100
        elif word in ("thousand", "million"):
            total, part = total + part * {"thousand": 1000, "million": 10**6}[word], 0
        else:
            part += value[word]
    assert total + part == n


def test_sentences_differ_and_do_not_depend_on_how_many():
    texts = sentences(0, 200)
    assert texts[:50] == sentences(0, 50) and len(set(texts)) > 195 and not set(texts) & set(sentences(1, 50))
    assert not [t for t in texts if re.search(r"\b[Aa] [aeio]|\{|_|  ", t)]


def test_accents_and_ipa():
    assert accent("the", 1) is None and accent("station", 2) == 0
    assert accent("today", 2) == 1 and accent("animal", 3) == 0
    assert from_ipa("tʃ") == ["ch"] and from_ipa("aɪ") == ["ay"]
    assert from_ipa("əl") == ["ax", "l"] and from_ipa("") == ["sil"]


def test_rate_pitch_voice_and_seed_do_something():
    base = speak("Mama made a pie.", engine="builtin")
    assert speak("Mama made a pie.", engine="builtin", rate_wpm=300).seconds < .75 * base.seconds
    band = slice(*(round(f * 2**17 / base.rate) for f in (60, 300)))
    peak = lambda s: np.argmax(np.abs(np.fft.rfft(s.wave, 2**17))[band])
    assert peak(speak("Mama made a pie.", "en-us+f2", engine="builtin")) > peak(base)
    assert not np.array_equal(speak("Mama made a pie.", engine="builtin", seed=1).wave, base.wave)


def test_vowels_have_their_formants():
    line = (module.Phoneme("aa", 0, .5), module.Phoneme("iy", .5, 1))
    wave = synthesize(line, ".")

    def low(a, b):
        "Energy between 600 and 1300 Hz."
        bins = slice(*(round(f * (b - a) / VOICE_RATE) for f in (600, 1300)))
        return np.sum(np.abs(np.fft.rfft(wave[a:b]))[bins] ** 2)

    assert low(3000, 9000) > 5 * low(14000, 20000)  # the second formant of "ah" lies there, none of "ee" does


@pytest.mark.parametrize("bad", [
    dict(text=""), dict(text=" \n"), dict(text="x" * 2001), dict(text="...!"), dict(text="猫"), dict(text=None),
    dict(text="a\0b"), dict(voice="klingon"), dict(voice="../x"), dict(voice=""), dict(rate_wpm=0),
    dict(rate_wpm=1e9), dict(pitch=-1), dict(engine="tts"),
])
def test_bad_input_is_refused(bad):
    with pytest.raises(InputError, match=next(iter(bad))):
        speak(**{"text": "hello", "engine": "builtin", **bad})


def test_without_espeak_the_builtin_voice_speaks(monkeypatch):
    monkeypatch.setattr(module, "ESPEAK_LIBRARIES", ("libdoes-not-exist.so",))
    assert speak("hello").engine == "builtin"
    with pytest.raises(MissingResource, match="espeak"):
        speak("hello", engine="espeak")


@needs_espeak
def test_a_broken_espeak_falls_back(monkeypatch):
    monkeypatch.setattr(module, "_ESPEAK_CHILD", "import os; os._exit(3)")
    assert speak("hello").engine == "builtin"
    with pytest.raises(MissingResource):
        speak("hello", engine="espeak")


@needs_espeak
def test_espeak_reads_other_languages_and_refuses_unknown_voices():
    check_timeline(speak("Über schöne große Mäuse", voice="de"))
    with pytest.raises(InputError, match="voice"):
        speak("hello", voice="xx-yy")
