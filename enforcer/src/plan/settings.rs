//! What the settings say differently.

use std::collections::BTreeSet;

use crate::settings::{Failsafe, Settings, essentials_off, ethertype_name};

use super::{
    text::Details,
    types::{Items, Sign},
};

pub(super) fn compare(before: &Settings, after: &Settings) -> Items {
    let mut items = Items::default();
    let mut changed = |name: &str, details: Details| {
        if !details.is_empty() {
            items.push(Sign::Changed, name, None, details);
        }
    };
    let off = |settings: &Settings| -> BTreeSet<String> {
        let off = essentials_off(settings.essentials).into_iter();
        off.map(str::to_owned).collect()
    };
    let mut details = Details::default();
    details.sets("off", &off(before), &off(after));
    changed("essentials", details);
    let listed = |settings: &Settings| -> BTreeSet<String> {
        let listed = settings.ethertypes.iter().copied();
        listed.map(ethertype_name).collect()
    };
    let mut details = Details::default();
    details.sets("listed", &listed(before), &listed(after));
    changed("ethertypes", details);
    let (one, other) = (&before.access, &after.access);
    let mut details = Details::default();
    details.compare("change", &one.change, &other.change, String::clone);
    details.compare("view", &one.view, &other.view, String::clone);
    changed("control", details);

    let named = |settings: &'_ Settings, name: &str| -> Option<Failsafe> {
        settings.failsafes.iter().find(|f| f.name == name).cloned()
    };
    for new in &after.failsafes {
        let name = format!("failsafe {}", new.name);
        match named(before, &new.name) {
            None => items.push(Sign::Added, &name, None, Details::one(sentence(new))),
            Some(old) if old != *new => {
                let mut details = Details::default();
                for (what, of) in PARTS {
                    details.sets(what, &of(&old), &of(new));
                }
                items.push(Sign::Changed, &name, None, details);
            }
            Some(_) => {}
        }
    }
    for old in &before.failsafes {
        if named(after, &old.name).is_none() {
            let name = format!("failsafe {}", old.name);
            items.push(Sign::Removed, &name, None, Details::one(sentence(old)));
        }
    }
    items
}

type Part = (&'static str, fn(&Failsafe) -> BTreeSet<String>);

const PARTS: [Part; 3] = [
    ("sources", |f| {
        f.passes.sources.iter().map(ToString::to_string).collect()
    }),
    ("ports", |f| f.ports().into_iter().collect()),
    ("interfaces", |f| {
        let patterns = f.passes.interfaces.iter();
        patterns
            .map(|pattern| pattern.as_str().to_owned())
            .collect()
    }),
];

fn sentence(failsafe: &Failsafe) -> String {
    let parts = PARTS.map(|(what, of)| (what, Vec::from_iter(of(failsafe))));
    let parts = parts.into_iter().filter(|(_, names)| !names.is_empty());
    let parts = parts.map(|(what, names)| format!("{what} {}", names.join(", ")));
    Vec::from_iter(parts).join("; ")
}
