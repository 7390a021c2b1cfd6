//! Instants and durations as text. Parsing alone: no clock is read.

use super::address::Problem;
use crate::policy::diag::shown;

/// Longest duration, in seconds: 365 days.
const LONGEST: u32 = 365 * 86_400;

/// `2026-12-24T18:00:00Z`, or with an offset such as `+01:00`, as a Unix second after 1970 began.
pub(super) fn instant(text: &str) -> Result<u64, Problem> {
    let problem = |help: &str| {
        let message = format!("{} is not an instant", shown(text));
        ("E0501", message, Some(help.to_owned()))
    };
    let shape = |shape: &str| {
        text.len() == shape.len()
            && text.bytes().zip(shape.bytes()).all(|(byte, wanted)| {
                if wanted == b'0' {
                    byte.is_ascii_digit()
                } else if wanted == b'+' {
                    matches!(byte, b'+' | b'-')
                } else {
                    byte == wanted
                }
            })
    };
    if !shape("0000-00-00T00:00:00Z") && !shape("0000-00-00T00:00:00+00:00") {
        let local = shape("0000-00-00T00:00:00");
        return Err(problem(if local {
            "say where its clock stands: end it with `Z` for UTC, or with an offset such as `+01:00`"
        } else {
            "write date, time and offset, such as `2026-12-24T18:00:00Z` or `2026-12-24T19:00:00+01:00`"
        }));
    }
    let Ok(instant) = text.parse::<jiff::Timestamp>() else {
        return Err(problem("no calendar has this date and time"));
    };
    match u64::try_from(instant.as_second()) {
        Ok(second) if second > 0 => Ok(second),
        _ => Err(problem("instants come after 1970-01-01T00:00:00Z")),
    }
}

/// `90s`, `15m`, `8h` or `2d`, in seconds.
pub(super) fn duration(text: &str) -> Result<u32, Problem> {
    let units = [("s", 1), ("m", 60), ("h", 3_600), ("d", 86_400)];
    let found = units.iter().find_map(|(unit, seconds)| {
        let digits = text.strip_suffix(unit)?;
        let plain = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
        (plain && (digits == "0" || !digits.starts_with('0'))).then_some((digits, *seconds))
    });
    let Some((digits, seconds)) = found else {
        return Err((
            "E0502",
            format!("{} is not a duration", shown(text)),
            Some("write a whole number and a unit: `90s`, `15m`, `8h` or `2d`".to_owned()),
        ));
    };
    let count: Option<u32> = digits.parse().ok();
    count
        .and_then(|count| count.checked_mul(seconds))
        .filter(|seconds| (1..=LONGEST).contains(seconds))
        .ok_or_else(|| {
            let message = format!("{} is out of bounds", shown(text));
            ("E0503", message, Some("write `1s` to `365d`".to_owned()))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instants() {
        for (text, unix) in [
            ("1970-01-01T00:00:01Z", 1),
            ("2026-12-24T18:00:00Z", 1_798_135_200),
            ("2026-12-24T19:00:00+01:00", 1_798_135_200),
            ("2026-12-24T12:30:00-05:30", 1_798_135_200),
            ("2024-02-29T23:59:59Z", 1_709_251_199),
            ("2200-01-01T00:00:00Z", 7_258_118_400),
        ] {
            assert_eq!(instant(text), Ok(unix), "{text}");
        }
        for bad in [
            "",
            "2026-12-24",
            "2026-12-24T18:00:00",
            "2026-12-24T18:00Z",
            "2026-12-24 18:00:00Z",
            "2026-12-24t18:00:00z",
            "2026-12-24T18:00:00.5Z",
            "2026-12-24T18:00:00Z[UTC]",
            "2026-02-29T00:00:00Z",
            "2026-13-01T00:00:00Z",
            "2026-12-24T25:00:00Z",
            "2026-12-24T18:00:00+99:00",
            "1970-01-01T00:00:00Z",
            "1969-12-31T23:59:59Z",
            "0000-00-00T00:00:00Z",
            "2026-12-24T18:00:00\u{e9}1:00",
            "1798135200",
        ] {
            assert_eq!(instant(bad).unwrap_err().0, "E0501", "{bad}");
        }
    }

    #[test]
    fn durations() {
        for (text, seconds) in [
            ("1s", 1),
            ("90s", 90),
            ("15m", 900),
            ("8h", 28_800),
            ("2d", 172_800),
            ("365d", LONGEST),
            ("31536000s", LONGEST),
        ] {
            assert_eq!(duration(text), Ok(seconds), "{text}");
        }
        for (bad, code) in [
            ("", "E0502"),
            ("15", "E0502"),
            ("m", "E0502"),
            ("1.5h", "E0502"),
            ("-1s", "E0502"),
            ("015m", "E0502"),
            ("15 m", "E0502"),
            ("15min", "E0502"),
            ("1h30m", "E0502"),
            ("0s", "E0503"),
            ("366d", "E0503"),
            ("31536001s", "E0503"),
            ("99999999999999999999d", "E0503"),
            ("4294967295d", "E0503"),
        ] {
            assert_eq!(duration(bad).unwrap_err().0, code, "{bad}");
        }
    }
}
