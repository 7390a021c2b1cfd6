//! Names of interfaces with globs.

use std::str::FromStr;

use super::diag::shown;

/// Longest pattern, in bytes.
const LONGEST: usize = 64;

/// A name of an interface, in which `*` stands for any characters and `?` for one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pattern(String);

impl Pattern {
    /// Whether it can only match itself.
    pub fn is_literal(&self) -> bool {
        !self.0.contains(['*', '?'])
    }

    /// As written.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether `name` is meant.
    pub fn matches(&self, name: &str) -> bool {
        matches(self.0.as_bytes(), name.as_bytes())
    }
}

impl FromStr for Pattern {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        // The kernel's own limits for names (dev_valid_name), but for the globs.
        let bad = |c: char| c == '/' || c == ':' || c.is_whitespace() || c.is_control();
        if text.is_empty() || text.contains(bad) {
            return Err(format!(
                "{} cannot be the name of an interface",
                shown(text)
            ));
        }
        if text.len() > 15 && (!text.contains('*') || text.len() > LONGEST) {
            return Err(format!(
                "{} is too long: names of interfaces have up to 15 characters",
                shown(text)
            ));
        }
        Ok(Self(text.to_owned()))
    }
}

/// Both go forward only; after a mismatch the last `*` takes one character more.
fn matches(pattern: &[u8], name: &[u8]) -> bool {
    let (mut p, mut n) = (0, 0);
    let mut star = None;
    while let Some(byte) = name.get(n) {
        match pattern.get(p) {
            Some(b'*') => {
                star = Some((p + 1, n));
                p += 1;
            }
            Some(wanted) if wanted == byte || *wanted == b'?' => {
                p += 1;
                n += 1;
            }
            _ => {
                let Some((after, from)) = star else {
                    return false;
                };
                star = Some((after, from + 1));
                (p, n) = (after, from + 1);
            }
        }
    }
    pattern.iter().skip(p).all(|byte| *byte == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn globs() {
        let pattern = |text: &str| text.parse::<Pattern>().unwrap();
        for (glob, name, expected) in [
            ("eth0", "eth0", true),
            ("eth0", "eth01", false),
            ("eth0", "eth", false),
            ("veth*", "veth", true),
            ("veth*", "veth12ab", true),
            ("veth*", "xveth1", false),
            ("*.20", "eth0.20", true),
            ("*.20", "eth0.20.20", true),
            ("*.20", "eth0.200", false),
            ("e?h*-*", "eth0-x-y", true),
            ("e?h", "eh", false),
            ("*", "anything", true),
            ("**", "", true),
        ] {
            assert_eq!(pattern(glob).matches(name), expected, "{glob} {name}");
        }
        assert!(pattern("eth0").is_literal() && !pattern("e*").is_literal());
        for bad in ["", "a b", "a/b", "eth0:1", "0123456789abcdef", "a\u{1b}"] {
            assert!(bad.parse::<Pattern>().is_err(), "{bad:?}");
        }
        assert!("*".repeat(LONGEST).parse::<Pattern>().is_ok());
        assert!("*".repeat(LONGEST + 1).parse::<Pattern>().is_err());
    }
}
