//! What a guest says on its serial port: the lines of `init.sh`, and libtest's JSON.

use std::collections::VecDeque;

use serde_json::Value;

/// What became of a test.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It passed.
    Ok,
    /// It passed, saying that the kernel lacks what it is about.
    Skipped(String),
    /// It failed; its output.
    Failed(String),
    /// It is marked `#[ignore]`.
    Ignored,
}

impl Outcome {
    /// As a column of a table says it.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Skipped(_) => "skipped",
            Self::Failed(_) => "FAILED",
            Self::Ignored => "ignored",
        }
    }
}

/// A test that came to an end.
#[derive(Clone, Debug, PartialEq)]
pub struct Test {
    /// Binary and name: `flow::a_test`.
    pub name: String,
    pub outcome: Outcome,
    pub seconds: f64,
}

/// A line with news.
#[derive(Debug, PartialEq)]
pub enum News {
    /// The guest is up; its release.
    Booted(String),
    /// It asks what to run next.
    Asks,
    /// It did not understand the answer.
    AsksAgain,
    /// A test binary was started.
    Started(String),
    /// A test binary ended with this exit status.
    Ended(String, i32),
    /// It was told that there is no more to do.
    Done,
}

/// What the verifier went through for a program, as a test of the suite measured it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cost {
    pub program: String,
    pub instructions: u32,
    /// Bytes on the deepest call chain.
    pub stack: Option<u32>,
}

/// How many lines of noise are kept to explain a crash.
const NOISE: usize = 40;

/// Everything a guest has said.
#[derive(Debug, Default)]
pub struct Transcript {
    /// `uname -r`.
    pub release: Option<String>,
    /// Tests that ended.
    pub tests: Vec<Test>,
    /// Test binaries that ended badly without a failed test to show for it.
    pub crashes: Vec<String>,
    pub costs: Vec<Cost>,
    /// It ended because there was no more to do.
    pub done: bool,
    binary: Option<String>,
    running: Vec<String>,
    failed_here: bool,
    noise: VecDeque<String>,
}

impl Transcript {
    /// Takes one line; says if it is more than a test's result.
    pub fn read(&mut self, line: &str) -> Option<News> {
        let line = line.trim_end();
        // A child of a test may have left its own line unfinished before either of ours.
        if let Some((_, words)) = line.split_once("@vm ") {
            return self.control(words);
        }
        let event = line
            .find("{ \"type\":")
            .or_else(|| line.find("{\"type\":"))
            .and_then(|at| serde_json::from_str::<Value>(&line[at..]).ok());
        match event {
            Some(event) => self.event(&event),
            None => self.keep_noise(line),
        }
        None
    }

    fn control(&mut self, words: &str) -> Option<News> {
        let (verb, rest) = words.split_once(' ').unwrap_or((words, ""));
        match verb {
            "boot" => {
                self.release = Some(rest.to_owned());
                Some(News::Booted(rest.to_owned()))
            }
            "next" => Some(News::Asks),
            "again" => Some(News::AsksAgain),
            "run" => {
                self.binary = Some(rest.to_owned());
                self.running.clear();
                self.noise.clear();
                self.failed_here = false;
                Some(News::Started(rest.to_owned()))
            }
            "stderr" => {
                self.keep_noise(rest);
                None
            }
            "end" => {
                let (name, code) = rest.rsplit_once(' ')?;
                let code = code.parse().ok()?;
                self.end(name, code);
                Some(News::Ended(name.to_owned(), code))
            }
            "done" => {
                self.done = true;
                Some(News::Done)
            }
            _ => None,
        }
    }

    fn end(&mut self, name: &str, code: i32) {
        self.binary = None;
        // libtest ends with 101 when a test failed, and says which.
        if code != 0 && !(code == 101 && self.failed_here && self.running.is_empty()) {
            let how = match code {
                // busybox's timeout: its own code, or that of the signal it sent.
                124 | 137 | 143 => "ran out of time".to_owned(),
                code if code > 128 => format!("died of signal {}", code - 128),
                code => format!("ended with status {code}"),
            };
            self.crashes.push(self.describe(name, &how));
        }
        self.running.clear();
    }

    /// Adds what another guest of the same kernel has said.
    pub fn join(&mut self, other: Self) {
        self.release = self.release.take().or(other.release);
        self.tests.extend(other.tests);
        self.crashes.extend(other.crashes);
        self.costs.extend(other.costs);
    }

    /// Says that the guest itself ended, or was ended, before its plan did.
    pub fn broke_off(&mut self, why: &str) {
        let crash = match self.binary.take() {
            Some(name) => self.describe(&name, why),
            None => why.to_owned(),
        };
        self.crashes.push(crash);
    }

    fn describe(&self, name: &str, how: &str) -> String {
        let mut text = format!("{name}: {how}");
        if !self.running.is_empty() {
            text += &format!(", while running {}", self.running.join(", "));
        }
        for line in &self.noise {
            text += &format!("\n  {line}");
        }
        text
    }

    fn keep_noise(&mut self, line: &str) {
        if line.is_empty() {
            return;
        }
        if self.noise.len() == NOISE {
            self.noise.pop_front();
        }
        self.noise.push_back(line.to_owned());
    }

    fn event(&mut self, event: &Value) {
        let Some(name) = event["name"].as_str().filter(|_| event["type"] == "test") else {
            return;
        };
        let output = event["stdout"].as_str().unwrap_or_default();
        let outcome = match event["event"].as_str().unwrap_or_default() {
            "started" => {
                self.running.push(name.to_owned());
                return;
            }
            "ok" => match skipped(output) {
                Some(reason) => Outcome::Skipped(reason),
                None => Outcome::Ok,
            },
            "failed" => {
                self.failed_here = true;
                let message = event["message"].as_str().unwrap_or_default();
                Outcome::Failed(format!("{output}{message}"))
            }
            "ignored" => Outcome::Ignored,
            // "timeout" is a warning that a test takes long.
            _ => return,
        };
        self.running.retain(|running| running != name);
        self.costs.extend(output.lines().filter_map(cost));
        let binary = self.binary.as_deref().unwrap_or("?");
        self.tests.push(Test {
            name: format!("{binary}::{name}"),
            outcome,
            seconds: event["exec_time"].as_f64().unwrap_or_default(),
        });
    }
}

fn skipped(output: &str) -> Option<String> {
    let lines = output.lines();
    let mut reasons = lines.filter_map(|line| line.trim().strip_prefix("SKIPPED: "));
    reasons.next().map(str::to_owned)
}

/// Reads `verifier: NAME N instructions, M bytes of stack`, or without the stack.
pub fn cost(line: &str) -> Option<Cost> {
    let mut words = line.trim().strip_prefix("verifier: ")?.split_whitespace();
    let program = words.next()?.to_owned();
    let instructions = words.next()?.parse().ok()?;
    let stack = words.nth(1).and_then(|bytes| bytes.parse().ok());
    Some(Cost {
        program,
        instructions,
        stack,
    })
}

/// Lines of a kernel's console that mean it is not well.
pub fn complaints(console: &str) -> Vec<&str> {
    const SIGNS: [&str; 8] = [
        "Kernel panic",
        "Oops",
        "BUG:",
        "kernel BUG at",
        "general protection fault",
        "WARNING: CPU:",
        "Out of memory:",
        "unregister_netdevice: waiting",
    ];
    let lines = console.lines();
    lines
        .filter(|line| SIGNS.iter().any(|sign| line.contains(sign)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
@vm boot 6.1.0-56-cloud-amd64
@vm next
@vm run flow
{ "type": "suite", "event": "started", "test_count": 3 }
{ "type": "test", "event": "started", "name": "a" }
{ "type": "test", "event": "started", "name": "b" }
Cannot find device "x"{ "type": "test", "name": "a", "event": "ok", "exec_time": 1.5 }
{ "type": "test", "name": "b", "event": "ok", "exec_time": 0.5, "stdout": "hello\nSKIPPED: no tcx\n" }
{ "type": "test", "event": "timeout", "name": "c" }
{ "type": "test", "name": "c", "event": "ignored" }
{ "type": "suite", "event": "ok", "passed": 2 }

@vm end flow 0
@vm next
@vm done
"#;

    fn read(text: &str) -> Transcript {
        let mut transcript = Transcript::default();
        for line in text.lines() {
            transcript.read(line);
        }
        transcript
    }

    #[test]
    fn results_and_reasons_are_read() {
        let got = read(&GOOD.replace('\n', "\r\n"));
        assert_eq!(got.release.as_deref(), Some("6.1.0-56-cloud-amd64"));
        let outcomes: Vec<_> = got
            .tests
            .iter()
            .map(|t| (t.name.as_str(), t.outcome.clone(), t.seconds))
            .collect();
        let want = [
            ("flow::a", Outcome::Ok, 1.5),
            ("flow::b", Outcome::Skipped("no tcx".into()), 0.5),
            ("flow::c", Outcome::Ignored, 0.0),
        ];
        assert_eq!(outcomes, want);
        assert!(got.done && got.crashes.is_empty(), "{got:?}");
    }

    #[test]
    fn guests_of_a_kernel_are_told_of_together() {
        let mut all = Transcript::default();
        all.join(read(GOOD));
        let mut broken = read("@vm boot 6.1\n@vm run x\n");
        broken.broke_off("the guest stopped");
        all.join(broken);
        assert_eq!(all.release.as_deref(), Some("6.1.0-56-cloud-amd64"));
        assert_eq!(all.tests.len(), 3);
        assert_eq!(all.crashes, ["x: the guest stopped"]);
    }

    #[test]
    fn failures_keep_their_output() {
        let got = read(
            "@vm run x\n{ \"type\": \"test\", \"event\": \"started\", \"name\": \"t\" }\n\
             { \"type\": \"test\", \"name\": \"t\", \"event\": \"failed\", \"stdout\": \"left: 1\\n\" }\n\
             @vm end x 101\n",
        );
        assert_eq!(got.tests[0].outcome, Outcome::Failed("left: 1\n".into()));
        assert!(got.crashes.is_empty(), "the failed test says it all");
        assert!(!got.done);
    }

    #[test]
    fn an_end_without_a_failed_test_is_a_crash() {
        let started =
            "@vm run x\n{ \"type\": \"test\", \"event\": \"started\", \"name\": \"t\" }\n";
        for (code, says) in [
            (124, "ran out of time"),
            (139, "signal 11"),
            (101, "status 101"),
        ] {
            let text = format!("{started}@vm stderr last words\n@vm end x {code}\n");
            let crash = &read(&text).crashes[0];
            assert!(crash.contains(says), "{crash}");
            assert!(crash.contains("while running t"), "{crash}");
            assert!(crash.contains("last words"), "{crash}");
        }
        let mut cut = read(started);
        cut.broke_off("the guest stopped");
        assert_eq!(cut.crashes, ["x: the guest stopped, while running t"]);
    }

    #[test]
    fn a_failed_test_does_not_hide_one_that_never_ended() {
        let got = read(
            "@vm run x\n{ \"type\": \"test\", \"event\": \"started\", \"name\": \"t\" }\n\
             { \"type\": \"test\", \"event\": \"started\", \"name\": \"u\" }\n\
             { \"type\": \"test\", \"name\": \"t\", \"event\": \"failed\" }\n@vm end x 101\n",
        );
        assert!(got.crashes[0].contains("while running u"));
    }

    #[test]
    fn costs_are_read_from_the_output_of_a_test() {
        let got = read(
            "@vm run programs\n{ \"type\": \"test\", \"name\": \"t\", \"event\": \"ok\", \"stdout\": \
             \"verifier: tc_ingress 174000 instructions, 320 bytes of stack\\nverifier: clock 5 \
             instructions\\nverifier: no\\n\" }\n",
        );
        let cost = |program: &str, instructions, stack| Cost {
            program: program.to_owned(),
            instructions,
            stack,
        };
        let want = [
            cost("tc_ingress", 174_000, Some(320)),
            cost("clock", 5, None),
        ];
        assert_eq!(got.costs, want);
    }

    #[test]
    fn a_sick_kernel_is_noticed() {
        let console = "[ 0.1] Linux version 6.1\n[ 1.0] BUG: unable to handle page fault\n\
                       [ 1.1] Oops: 0002 [#1]\n[ 2.0] device eth0 entered promiscuous mode\n";
        assert_eq!(complaints(console).len(), 2);
    }
}
