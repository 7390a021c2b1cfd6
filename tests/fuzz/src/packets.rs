//! Fuzzes `packets`.
#![no_main]

libfuzzer_sys::fuzz_target!(
    init: {
        enforcer_tests::fuzz::prepare(enforcer_fuzz::target("packets"));
    },
    |data: &[u8]| {
        (enforcer_fuzz::target("packets").run)(data);
    }
);
