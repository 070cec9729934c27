#!/usr/bin/env python3
"""Make .venv ready: find Python 3.11 or 3.12, install what settings.ini asks for, and leave a stamp.

Run by `make`. Standard library only, and old syntax on purpose: any Python 3 may start it. A second run is instant,
a half-made .venv is repaired, and whatever goes wrong is said in one sentence.
"""
import glob
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VENV = os.path.join(ROOT, ".venv")
STAMP = os.path.join(VENV, ".nofa-stamp")
LOG = os.path.join(VENV, "install.log")
STAMPED = ("settings.ini", "constraints.txt", "setup.py")  # a change in any of these installs again
SUPPORTED = ((3, 11), (3, 12))
NEEDS_GB, UPDATE_GB = 9, 3  # disk for the first install and for a later change
NO_NETWORK = re.compile(
    r"Failed to establish a new connection|NewConnectionError|NameResolutionError|Temporary failure in name resolution"
    r"|Network is unreachable|nodename nor servname|Could not resolve|ProxyError|Connection refused|ConnectTimeout"
    r"|Read timed out|ReadTimeoutError|Connection aborted|\(from versions: none\)"
)


class Stop(Exception):
    "The one sentence with which set-up gives up."


def say(text):
    print(text, flush=True)


def output(command, **kwargs):
    "(exit status, standard output) of a command; (127, '') when it cannot be run."
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, universal_newlines=True, **kwargs
        )
        return done.returncode, done.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return 127, ""


# --- Python ---------------------------------------------------------------------------------------------------------
PROBE = (
    "import sys\n"
    "try:\n import venv, ensurepip; ok = 1\n"
    "except ImportError: ok = 0\n"
    "print(sys.version_info[0], sys.version_info[1], ok, sys.executable)"
)


def candidates():
    "Commands that may be a Python, best first. Any of them may be missing, too old, or a shim that only complains."
    named = [os.environ["NOFA_PYTHON"]] if os.environ.get("NOFA_PYTHON") else []
    named += ["python3.12", "python3.11", "python3", sys.executable]
    for pattern in ("~/.pyenv/versions/3.12.*/bin/python", "~/.pyenv/versions/3.11.*/bin/python"):
        named += sorted(glob.glob(os.path.expanduser(pattern)), reverse=True)
    return named


def find_python(commands=None):
    "The first working Python 3.11 or 3.12, as (path, has venv and ensurepip); one with them goes first."
    found = []
    for command in commands if commands is not None else candidates():
        status, text = output([command, "-c", PROBE], timeout=30)
        words = text.split(None, 3)
        if status == 0 and len(words) == 4 and (int(words[0]), int(words[1])) in SUPPORTED:
            if words[2] == "1":
                return words[3], True
            found.append((words[3], False))
    if found:
        return found[0]
    raise Stop(
        "no working Python 3.11 or 3.12 was found: install one (Debian 12, Ubuntu 24.04: sudo apt-get install "
        "python3 python3-venv; macOS: brew install python@3.12) or point NOFA_PYTHON at it."
    )


def apt(*packages):
    "Install Debian packages where we may; True when that worked."
    if not (hasattr(os, "geteuid") and os.geteuid() == 0 and shutil.which("apt-get")):
        return False
    env = dict(os.environ, DEBIAN_FRONTEND="noninteractive")
    for command in (["apt-get", "update", "-qq"], ["apt-get", "install", "-y", "-qq", *packages]):
        status, _ = output(command, env=env, timeout=900)
    return status == 0


def ensure_venv_module(python):
    "Debian splits venv off Python: install it as root, else say how."
    _, version = output([python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"])
    package = "python%s-venv" % version
    say("      installing " + package)
    if apt(package) or apt("python3-venv"):
        status, text = output([python, "-c", PROBE])
        if status == 0 and text.split()[2] == "1":
            return
    raise Stop("%s lacks the venv module: run 'sudo apt-get install %s' and start again." % (python, package))


# --- the environment ------------------------------------------------------------------------------------------------
def venv_python():
    return os.path.join(VENV, "bin", "python")


def healthy():
    "Can the environment's Python be run, is it a supported one, and has it pip?"
    code = "import sys, pip; print(sys.version_info[0], sys.version_info[1], sys.prefix)"
    status, text = output([venv_python(), "-c", code], timeout=60)
    words = text.split(None, 2)
    return (
        status == 0
        and (int(words[0]), int(words[1])) in SUPPORTED
        and os.path.realpath(words[2]) == os.path.realpath(VENV)
    )


def fingerprint():
    "Hash of everything that decides what is installed."
    digest = hashlib.sha256()
    for name in STAMPED:
        with open(os.path.join(ROOT, name), "rb") as file:
            digest.update(file.read().replace(b"\r\n", b"\n") + b"\0")
    return digest.hexdigest()


def up_to_date():
    try:
        with open(STAMP) as file:
            return file.read().strip() == fingerprint() and healthy()
    except OSError:
        return False


def check_disk(needed_gb):
    free = shutil.disk_usage(ROOT).free / 1e9
    if free < needed_gb:
        raise Stop("%d GB of free disk are needed in %s, %.1f GB are there." % (needed_gb, ROOT, free))


def make_venv():
    "A new .venv, in place of one that does not work."
    if os.path.islink(VENV) or (os.path.exists(VENV) and not os.path.isdir(VENV)):
        raise Stop("%s is not a folder of ours and does not work as an environment: move it away." % VENV)
    if os.path.isdir(VENV):
        say("      .venv does not work: making it anew")
        shutil.rmtree(VENV)
    check_disk(NEEDS_GB)
    python, complete = find_python()
    if not complete:
        ensure_venv_module(python)
    say("      with " + python)
    status, _ = output([python, "-m", "venv", VENV])
    if status != 0 or not healthy():
        raise Stop(
            "%s could not make an environment in %s: see '%s -m venv %s' for its reason." % (python, VENV, python, VENV)
        )


# --- pip ------------------------------------------------------------------------------------------------------------
def explain(text):
    "One sentence for a failed pip run, from what it printed."
    if "No space left on device" in text or "Errno 28" in text:
        return "the disk is full: free %d GB and start again, what is there is kept." % NEEDS_GB
    if NO_NETWORK.search(text):
        return "pip cannot reach its package index: check the network (or pip's own index settings) and start again."
    errors = [line for line in text.splitlines() if line.startswith("ERROR")] or text.strip().splitlines()[-1:]
    return "pip could not install: %s (all of its words are in %s)." % (" ".join(errors)[:300], LOG)


def show(line, began, counts, state):
    "One compact line of progress from a line of pip's."
    word = line.split()[0] if line.split() else ""
    if word in ("Collecting", "Downloading", "Obtaining", "Building", "Preparing", "Installing", "Using"):
        counts[word] = counts.get(word, 0) + 1
        what = line.split()[1] if word in ("Collecting", "Obtaining") else ""
        text = "%d packages found, %s" % (counts.get("Collecting", 0), (word.lower() + " " + what).strip())
        if word == "Installing":
            text = "unpacking %d packages" % (line.count(",") + 1)
        now = time.time()
        if sys.stdout.isatty():
            sys.stdout.write("\r\033[K      %4d s  %s" % (now - began, text[:90]))
            sys.stdout.flush()
        elif now - state.get("last", 0) > 10 or word == "Installing":
            say("      %4d s  %s" % (now - began, text))
            state["last"] = now


def pip(*arguments):
    "Run pip in the environment with progress; its whole output goes to .venv/install.log."
    began, counts, state, kept = time.time(), {}, {}, []
    command = [venv_python(), "-m", "pip", "--no-input", "--disable-pip-version-check", "install", *arguments]
    with open(LOG, "a") as log:
        log.write("\n$ %s\n" % " ".join(command))
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True
        )
        for line in process.stdout:
            log.write(line)
            kept.append(line)
            show(line.strip(), began, counts, state)
        status = process.wait()
    if sys.stdout.isatty():
        sys.stdout.write("\r\033[K")
    text = "".join(kept)
    if status != 0 or ("Retry(total=0" in text and NO_NETWORK.search(text)):
        raise Stop(explain(text))


def imports(code):
    "('' or the last line of the error) of a line of Python in the environment."
    done = subprocess.run(
        [venv_python(), "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True, cwd=ROOT
    )
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["unknown"])[-1]


# --- system packages, all optional ----------------------------------------------------------------------------------
def extras():
    "Speech and the libraries that OpenCV links to: told, and installed only on a CI machine where we are root."
    missing = []
    if not shutil.which("espeak-ng"):
        missing.append(("espeak-ng", "without it clips speak with the built-in, simpler voice"))
    error = imports("import cv2")
    if "libGL" in error or "libgthread" in error or "libglib" in error:
        missing.append(("libgl1 libglib2.0-0", "without them the landmark detector of real photos cannot start"))
    if missing and os.environ.get("CI") and apt(*" ".join(names for names, _ in missing).split()):
        say("      installed " + " ".join(names for names, _ in missing))
        return
    for names, why in missing:
        tool = "brew" if sys.platform == "darwin" else "sudo apt-get"
        say("      optional: %s (%s install %s)" % (why, tool, names))


def compile_kernels():
    "Compile the C++ now rather than at its first use. Without a compiler plain PyTorch does its work, which is said."
    if os.environ.get("NOFA_BUILD") != "0":
        code = "from nofa_nb.ops.extension import extension; print(extension())"
        reason = output([venv_python(), "-W", "ignore", "-c", code])[1]
        if reason:
            say("  the C++ kernels are not compiled, rendering will be slow: %s" % reason)


def main():
    if up_to_date():
        return
    began = time.time()
    say("[1/4] environment in .venv")
    if not healthy():
        make_venv()
    else:
        check_disk(UPDATE_GB if imports("import torch") == "" else NEEDS_GB)
    if os.path.exists(STAMP):
        os.remove(STAMP)
    say("[2/4] pip")
    pip("--quiet", "--retries", "2", "--upgrade", "pip")
    say("[3/4] packages (about 260; 6 GB; a few minutes the first time)")
    pip("--retries", "2", "-c", "constraints.txt", "-e", ".[dev]")
    say("[4/4] check")
    broken = imports("import torch, torchvision, numpy, nbdev, nofa_nb")
    if broken:
        raise Stop(
            "the packages are installed but do not import (%s): delete .venv and start again." % broken
        )
    extras()
    compile_kernels()
    with open(STAMP, "w") as file:
        file.write(fingerprint() + "\n")
    say("ready in %d s" % (time.time() - began))


if __name__ == "__main__":
    try:
        main()
    except Stop as stop:
        if sys.stdout.isatty():
            sys.stdout.write("\n")
        print("nofa set-up: %s" % stop, file=sys.stderr, flush=True)
        sys.exit(1)
    except OSError as error:
        full = getattr(error, "errno", None) == 28
        sentence = explain("No space left on device") if full else "%s." % error
        print("nofa set-up: %s" % sentence, file=sys.stderr, flush=True)
        sys.exit(1)
    except KeyboardInterrupt:
        print("\nnofa set-up: stopped; start again to go on.", file=sys.stderr)
        sys.exit(130)
