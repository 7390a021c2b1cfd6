//! Fuzzes `policy`.
#![no_main]

libfuzzer_sys::fuzz_target!(
    init: {
        enforcer_tests::fuzz::prepare(enforcer_fuzz::target("policy"));
    },
    |data: &[u8]| {
        (enforcer_fuzz::target("policy").run)(data);
    }
);
