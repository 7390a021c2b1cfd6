//! Names of figures, for the plots find them by these.

use enforcer_tests::line_rate::report::whole;

/// Verdicts about the same two addresses.
pub const ONE: &str = "verdict, one pair";
/// About random ones.
pub const ANY: &str = "verdict, random pairs";
/// The same with the flow entered.
pub const OPENS: &str = "new flow, random pairs";
/// What the kernel's trie takes for the addresses of those.
pub const LPM: &str = "two LPM look-ups, random";

/// Established flows of a family.
pub fn established(family: &str, count: u32) -> String {
    format!("{family}: {}", whole(count.into()))
}

/// The unit beside them, with keys of so many bytes.
pub fn lru_hit(key: u32, count: u32) -> String {
    format!("LRU hash hit, {key}-byte key: {}", whole(count.into()))
}

/// Something with so many rules.
pub fn rules(count: u32, what: &str) -> String {
    format!("{} rules: {what}", whole(count.into()))
}

/// Something with so many members.
pub fn members(family: &str, count: u32, what: &str) -> String {
    format!("{family}, {} members: {what}", whole(count.into()))
}
