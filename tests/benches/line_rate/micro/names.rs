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
    format!("{family}: {} flow{}", whole(count.into()), plural(count))
}

/// The unit beside them.
pub fn lru_hit(count: u32) -> String {
    format!("LRU hash hit: {} key{}", whole(count.into()), plural(count))
}

fn plural(count: u32) -> &'static str {
    if count == 1 { "" } else { "s" }
}

/// Something with so many rules.
pub fn rules(count: u32, what: &str) -> String {
    format!("{} rules: {what}", whole(count.into()))
}

/// Something with so many members.
pub fn members(family: &str, count: u32, what: &str) -> String {
    format!("{family}: {} members: {what}", whole(count.into()))
}
