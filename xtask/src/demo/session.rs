//! A live session between application and database, and the edit of the policy that cuts it.

use std::io::{BufRead, BufReader, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::topology::{self, APP, DB, Family};

/// Pause between two lines.
const BEAT: Duration = Duration::from_millis(200);

/// A TCP session that says a line each [`BEAT`] and notes when the last answer came.
pub struct Session {
    stream: TcpStream,
    last: Arc<Mutex<(Instant, u32)>>,
    stop: Arc<AtomicBool>,
}

impl Session {
    /// Connects the application to the database and begins to talk.
    pub fn open() -> Result<Self> {
        let to = SocketAddr::from((DB.address(Family::V4)?, 5432));
        let stream = topology::inside(APP.name, || {
            TcpStream::connect_timeout(&to, Duration::from_secs(4))
        })?
        .context("the session could not be opened")?;
        let last = Arc::new(Mutex::new((Instant::now(), 0)));
        let stop = Arc::new(AtomicBool::new(false));

        let (mut writer, ended) = (stream.try_clone()?, Arc::clone(&stop));
        thread::spawn(move || {
            while !ended.load(Ordering::Relaxed) && writeln!(writer, "are you there?").is_ok() {
                thread::sleep(BEAT);
            }
        });
        let (reader, noted) = (stream.try_clone()?, Arc::clone(&last));
        thread::spawn(move || {
            for _ in BufReader::new(reader).lines().map_while(Result::ok) {
                let mut last = noted.lock().unwrap_or_else(PoisonError::into_inner);
                *last = (Instant::now(), last.1 + 1);
            }
        });
        Ok(Self { stream, last, stop })
    }

    /// When the last answer came, and how many there were.
    pub fn last(&self) -> (Instant, u32) {
        *self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until no answer has come for a second; false when it talks on beyond `limit`.
    pub fn falls_silent_within(&self, limit: Duration) -> bool {
        wait(limit, || self.last().0.elapsed() > Duration::from_secs(1))
    }

    /// Waits for an answer later than `since`.
    pub fn answers_after(&self, since: Instant, limit: Duration) -> bool {
        wait(limit, || self.last().0 > since)
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // Wakes the reader; fails only where the session is gone already.
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

/// Polls until `done` or the limit; tells which.
pub fn wait(limit: Duration, mut done: impl FnMut() -> bool) -> bool {
    let start = Instant::now();
    loop {
        if done() {
            return true;
        }
        if start.elapsed() > limit {
            return false;
        }
        thread::sleep(Duration::from_millis(10));
    }
}

/// The policy without the rule that admits the session, and without the tests that demand it.
///
/// Lines are commented out and not removed, so that line numbers stay what they were.
/// `None` when there is no such rule.
pub fn revoke(policy: &str) -> Option<String> {
    let lines: Vec<&str> = policy.lines().collect();
    let mut out = String::new();
    let mut found = false;
    let mut at = 0;
    while at < lines.len() {
        let indent = |line: &str| line.len() - line.trim_start().len();
        let mut end = at + 1;
        if lines[at].trim_start().starts_with("- ") {
            // The item goes on while lines are indented deeper than its dash.
            while end < lines.len()
                && !lines[end].trim().is_empty()
                && indent(lines[end]) > indent(lines[at])
            {
                end += 1;
            }
        }
        let item = lines[at..end].join("\n");
        let words: Vec<&str> = item
            .split(|c: char| c.is_whitespace() || "{},:\"".contains(c))
            .collect();
        let rule = words.contains(&"name") && words.contains(&"app-to-db");
        let test = words.contains(&"expect")
            && words.contains(&"allow")
            && words
                .iter()
                .any(|word| matches!(*word, "tcp/5432" | "postgresql"));
        found |= rule;
        for line in &lines[at..end] {
            if rule || test {
                out.push_str("# ");
            }
            out.push_str(line);
            out.push('\n');
        }
        at = end;
    }
    found.then_some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_rule_and_its_tests_go_and_no_line_moves() {
        let policy = "\
rules:
  - { name: app-to-db, from: [a], to: [b] }
  - name: other
    to: [b]
tests:
  - { service: tcp/5432, expect: allow }
  - { service: tcp/5432, expect: deny }
";
        let revoked = revoke(policy).unwrap();
        assert_eq!(revoked.lines().count(), policy.lines().count());
        let gone: Vec<&str> = revoked
            .lines()
            .filter(|line| line.starts_with('#'))
            .collect();
        assert_eq!(
            gone,
            [
                "#   - { name: app-to-db, from: [a], to: [b] }",
                "#   - { service: tcp/5432, expect: allow }"
            ]
        );
    }

    #[test]
    fn a_rule_over_several_lines_goes_as_a_whole() {
        let revoked = revoke("rules:\n  - name: app-to-db\n    from: [a]\n  - name: x\n").unwrap();
        assert_eq!(
            revoked,
            "rules:\n#   - name: app-to-db\n#     from: [a]\n  - name: x\n"
        );
        assert_eq!(revoke("rules: []\n"), None);
    }

    #[test]
    fn the_shipped_policy_has_the_rule() {
        let policy = include_str!("../../../segments/hospital.yaml");
        assert_ne!(revoke(policy).unwrap(), policy);
    }
}
