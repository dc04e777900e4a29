"""The smoother's threads: what an item throws in any of them reaches the caller, and the team goes on; helpers that
only cost time are sent away."""

import shutil
import subprocess
from pathlib import Path

import pytest

PROGRAM = r"""
#include "team.h"

#include <cstdio>
#include <cstdlib>
#include <new>

static bool helpers_throw(rtv::Team& team, std::thread::id caller) {
    std::atomic<bool> thrown{false};
    try {
        team.each(8, true, [&](int) {
            if (std::this_thread::get_id() == caller) {  // waits for what the others never bring about
                team.wait_until([&] { return false; });
            } else if (!thrown.exchange(true)) {
                throw std::bad_alloc();
            }
        });
    } catch (const std::bad_alloc&) {
        return true;
    }
    return false;
}

// Pieces of work that take longer with helpers, or without: after both were tried, the rest are done the other way.
static void tries_both_ways(rtv::Team& team, bool slower_alone) {
    bool alone = false;
    for (int piece = 0; piece < 66; ++piece) {
        std::atomic<int> sum{0};
        team.the_faster_way([&] {
            alone = team.alone();
            if (piece < 4 && alone == slower_alone) std::this_thread::sleep_for(std::chrono::milliseconds(100));
            team.each(10, true, [&](int item) { sum += item; });
        });
        if (sum != 45) std::exit(5);
        if ((piece < 2 || piece > 63) && alone) std::exit(6);  // the helpers have their chance, again and again
        if (piece == 63 && alone == slower_alone) std::exit(7);
    }
}

int main() {
    if (rtv::Team(2).alone()) return 77;
    for (bool slower_alone : {true, false}) {
        rtv::Team team(2);
        tries_both_ways(team, slower_alone);
    }
    for (int round = 0; round < 20; ++round) {
        rtv::Team team(3);  // anew: on a single core its helpers stay away four times as long after every stall
        if (team.alone()) return 77;
        if (!helpers_throw(team, std::this_thread::get_id())) return 1;
        std::atomic<int> sum{0};
        for (bool mine : {true, false}) team.each(100, mine, [&](int item) { sum += item; });
        if (sum != 2 * 4950) return 2;
        try {
            team.each(5, true, [&](int item) {
                if (item == 3) throw 7;
            });
            return 3;
        } catch (int seven) {
            if (seven != 7) return 4;
        }
    }
    return 0;
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_a_team(tmp_path: Path) -> None:
    headers = Path(__file__).resolve().parents[2] / "csrc" / "rtv"
    (tmp_path / "team.cpp").write_text(PROGRAM, encoding="utf-8")
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread", f"-I{headers}"]
    subprocess.run(["g++", *flags, tmp_path / "team.cpp", "-o", tmp_path / "team"], check=True)
    done = subprocess.run([tmp_path / "team"], timeout=120)
    if done.returncode == 77:
        pytest.skip("this system starts no further thread")
    assert done.returncode == 0
