//! Names: what they may look like, and which one was probably meant.

use crate::policy::diag::shown;

/// Words that rules use for sets no file declares.
pub(super) const BUILTINS: [&str; 4] = ["any", "unsegmented", "host", "multicast"];

/// Words that other YAML readers would not take for text.
const YAML_WORDS: [&str; 3] = ["null", "true", "false"];

/// Checks `[a-z0-9][a-z0-9-]{0,62}` and reserved words; `Err` says why, and what to write.
pub(crate) fn check(name: &str) -> Result<(), (&'static str, String, Option<String>)> {
    if BUILTINS.contains(&name) || YAML_WORDS.contains(&name) {
        let message = format!("{} is a reserved word and cannot be declared", shown(name));
        return Err(("E0112", message, None));
    }
    let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    if !name.is_empty() && name.len() <= 63 && name.chars().all(allowed) && !name.starts_with('-') {
        return Ok(());
    }
    let message = format!("{} is not a valid name", shown(name));
    let fixed: String = name
        .to_lowercase()
        .chars()
        .map(|c| if allowed(c) { c } else { '-' })
        .skip_while(|c| *c == '-')
        .take(63)
        .collect();
    let mut help =
        "names have 1 to 63 characters: a-z, 0-9 and `-`, not starting with `-`".to_owned();
    if !fixed.is_empty() && name.is_ascii() && name.len() <= 63 {
        help = format!("{help}; for example {}", shown(&fixed));
    }
    Err(("E0111", message, Some(help)))
}

/// The candidate closest to `word`, if it is close enough to be a slip of the pen.
pub(crate) fn closest<'a>(
    word: &str,
    candidates: impl IntoIterator<Item = &'a str>,
) -> Option<&'a str> {
    // Beyond any name's length nothing is similar, and the distance is quadratic.
    if word.len() > 80 {
        return None;
    }
    let lower = word.to_lowercase();
    let tolerance = (lower.chars().count() / 3).clamp(1, 3);
    candidates
        .into_iter()
        .map(|c| (strsim::damerau_levenshtein(&lower, c), c))
        .filter(|(distance, c)| *distance <= tolerance && *distance < c.chars().count())
        .min()
        .map(|(_, c)| c)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        for good in ["a", "0", "ehr-db", "a-", &"a".repeat(63)] {
            assert!(check(good).is_ok(), "{good}");
        }
        for bad in [
            "",
            "-a",
            "A",
            "a_b",
            "a.b",
            "ä",
            "a b",
            "any",
            "null",
            &"a".repeat(64),
        ] {
            assert!(check(bad).is_err(), "{bad}");
        }
        let (_, _, help) = check("Lab_Devices").unwrap_err();
        assert!(help.unwrap().ends_with("for example `lab-devices`"));
    }

    #[test]
    fn suggestions() {
        let names = ["ehr-db", "ehr-app", "guest-wifi"];
        assert_eq!(closest("erh-db", names), Some("ehr-db"));
        assert_eq!(closest("EHR-DB", names), Some("ehr-db"));
        assert_eq!(closest("guestwifi", names), Some("guest-wifi"));
        assert_eq!(closest("printers", names), None);
        assert_eq!(closest("x", ["a", "b"]), None);
    }
}
