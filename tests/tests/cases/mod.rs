//! (what it shows, policy without its version, packets).

pub type Case = (&'static str, &'static str, &'static str);

pub const CASES: &[Case] = &[
    (
        "one rule, default deny both ways",
        r#"
segments:
  app: { members: [{cidr: 10.0.1.0/24}] }
  db: { members: [{cidr: 10.0.2.0/24}] }
rules:
  - { name: sql, from: [app], to: [db], services: [postgresql] }
"#,
        "10.0.1.1 > 10.0.2.1 tcp 5432 = allowed rule_allow sql
         10.0.1.1 > 10.0.2.1 tcp 5433 = denied default_deny db
         10.0.1.1 > 10.0.2.1 udp 5432 = denied default_deny db
         10.0.2.1 > 10.0.1.1 tcp 5432 = denied default_deny app
         10.0.1.1 > 192.0.2.1 tcp 443 = denied default_deny app
         192.0.2.1 > 10.0.2.1 tcp 5432 = denied default_deny db
         192.0.2.1 > 192.0.2.2 tcp 5432 = allowed unsegmented",
    ),
    (
        "members of one segment need a rule too",
        r#"
segments:
  lab: { members: [{cidr: 10.0.1.0/24}] }
rules:
  - { name: peers, from: [lab], to: [lab], services: [tcp/9100-9110] }
"#,
        "10.0.1.1 > 10.0.1.2 tcp 9100 = allowed rule_allow peers
         10.0.1.1 > 10.0.1.2 tcp 9110 = allowed rule_allow peers
         10.0.1.1 > 10.0.1.2 tcp 9099 = denied default_deny lab
         10.0.1.1 > 10.0.1.2 tcp 9111 = denied default_deny lab",
    ),
    (
        "a deny goes before every allow, wherever it stands",
        r#"
segments:
  guest: { members: [{cidr: 10.0.1.0/24}] }
  clinic: { members: [{cidr: 10.0.2.0/24}] }
rules:
  - { name: all, from: [any], to: [any], services: [any] }
  - { name: no, from: [guest], to: [clinic], services: [tcp/22], action: deny }
"#,
        "10.0.1.1 > 10.0.2.1 tcp 22 = denied rule_deny no
         10.0.1.1 > 10.0.2.1 tcp 23 = allowed rule_allow all
         10.0.2.1 > 10.0.1.1 tcp 22 = allowed rule_allow all
         192.0.2.1 > 192.0.2.2 udp 1 = allowed rule_allow all",
    ),
    (
        "of several allows the first in file order is named",
        r#"
segments:
  a: { members: [{cidr: 10.0.1.0/24}] }
rules:
  - { name: one, from: [a], to: [any], services: [tcp/1-10] }
  - { name: two, from: [any], to: [any], services: [tcp/5-20] }
"#,
        "10.0.1.1 > 192.0.2.1 tcp 5 = allowed rule_allow one
         10.0.1.1 > 192.0.2.1 tcp 11 = allowed rule_allow two
         192.0.2.1 > 10.0.1.1 tcp 5 = allowed rule_allow two",
    ),
    (
        "an address is in every segment that matches; the most specific never wins",
        r#"
segments:
  wide: { members: [{cidr: 10.0.0.0/8}] }
  narrow: { members: [{cidr: 10.0.1.1/32}] }
rules:
  - { name: w, from: [wide], to: [unsegmented], services: [tcp/1] }
  - { name: n, from: [narrow], to: [unsegmented], services: [tcp/2] }
"#,
        "10.0.1.1 > 192.0.2.1 tcp 1 = allowed rule_allow w
         10.0.1.1 > 192.0.2.1 tcp 2 = allowed rule_allow n
         10.0.1.2 > 192.0.2.1 tcp 2 = denied default_deny wide
         10.0.1.2 > 10.0.1.1 tcp 9 = denied default_deny wide",
    ),
    (
        "except and range",
        r#"
segments:
  app: { members: [{cidr: 10.0.1.0/24, except: [10.0.1.66, 10.0.1.128/25]}, {range: 10.0.3.10-10.0.3.40}] }
rules:
  - { name: web, from: [app], to: [unsegmented], services: [https] }
"#,
        "10.0.1.65 > 192.0.2.1 tcp 443 = allowed rule_allow web
         10.0.1.66 > 192.0.2.1 tcp 443 = allowed unsegmented
         10.0.1.67 > 192.0.2.1 tcp 22 = denied default_deny app
         10.0.1.127 > 192.0.2.1 tcp 22 = denied default_deny app
         10.0.1.128 > 192.0.2.1 tcp 22 = allowed unsegmented
         10.0.3.9 > 192.0.2.1 tcp 22 = allowed unsegmented
         10.0.3.10 > 192.0.2.1 tcp 22 = denied default_deny app
         10.0.3.40 > 192.0.2.1 tcp 22 = denied default_deny app
         10.0.3.41 > 192.0.2.1 tcp 22 = allowed unsegmented",
    ),
    (
        "an exception of one member is a member by another",
        r#"
segments:
  app: { members: [{cidr: 10.0.1.0/24, except: [10.0.1.66]}, {cidr: 10.0.1.64/30}] }
rules:
  - { name: web, from: [app], to: [any], services: [https] }
"#,
        "10.0.1.66 > 192.0.2.1 tcp 443 = allowed rule_allow web
         10.0.1.66 > 192.0.2.1 tcp 80 = denied default_deny app",
    ),
    (
        "observe: judged denied, passes",
        r#"
segments:
  new: { members: [{cidr: 10.0.1.0/24}], mode: observe }
rules:
  - { name: web, from: [new], to: [any], services: [https] }
"#,
        "10.0.1.1 > 192.0.2.1 tcp 443 = allowed rule_allow web
         10.0.1.1 > 192.0.2.1 tcp 22 = would_deny default_deny new
         192.0.2.1 > 10.0.1.1 udp 53 = would_deny default_deny new",
    ),
    (
        "off: judged denied, passes without a record",
        r#"
segments:
  off-air: { members: [{cidr: 10.0.1.0/24}], mode: "off" }
rules:
  - { name: web, from: [off-air], to: [any], services: [https] }
"#,
        "10.0.1.1 > 192.0.2.1 tcp 22 = off default_deny off-air
         10.0.1.1 > 192.0.2.1 tcp 443 = allowed rule_allow web",
    ),
    (
        "the strongest guard decides and is named; the destination's on ties",
        r#"
segments:
  strict: { members: [{cidr: 10.0.1.0/24}], mode: enforce }
  soft: { members: [{cidr: 10.0.2.0/24}], mode: observe }
  none: { members: [{cidr: 10.0.3.0/24}], mode: "off" }
  twin: { members: [{cidr: 10.0.4.0/24}], mode: enforce }
rules:
  - { name: x, from: [strict], to: [soft], services: [tcp/1] }
"#,
        "10.0.1.1 > 10.0.2.1 tcp 22 = denied default_deny strict
         10.0.2.1 > 10.0.1.1 tcp 22 = denied default_deny strict
         10.0.2.1 > 10.0.3.1 tcp 22 = would_deny default_deny soft
         10.0.3.1 > 10.0.2.1 tcp 22 = would_deny default_deny soft
         10.0.3.1 > 10.0.3.2 tcp 22 = off default_deny none
         10.0.1.1 > 10.0.4.1 tcp 22 = denied default_deny twin
         10.0.4.1 > 10.0.1.1 tcp 22 = denied default_deny strict",
    ),
    (
        "protect: inbound",
        r#"
segments:
  server: { members: [{cidr: 10.0.1.0/24}], protect: inbound }
rules:
  - { name: web, from: [any], to: [server], services: [https] }
"#,
        "192.0.2.1 > 10.0.1.1 tcp 443 = allowed rule_allow web
         192.0.2.1 > 10.0.1.1 tcp 22 = denied default_deny server
         10.0.1.1 > 192.0.2.1 tcp 22 = allowed unsegmented
         10.0.1.1 > 10.0.1.2 tcp 22 = denied default_deny server",
    ),
    (
        "protect: outbound",
        r#"
segments:
  kiosk: { members: [{cidr: 10.0.1.0/24}], protect: outbound }
rules:
  - { name: web, from: [kiosk], to: [any], services: [https] }
"#,
        "10.0.1.1 > 192.0.2.1 tcp 443 = allowed rule_allow web
         10.0.1.1 > 192.0.2.1 tcp 22 = denied default_deny kiosk
         192.0.2.1 > 10.0.1.1 tcp 22 = allowed unsegmented",
    ),
    (
        "defaults: unsegmented: deny",
        r#"
defaults: { mode: enforce, unsegmented: deny }
segments:
  a: { members: [{cidr: 10.0.1.0/24}], protect: inbound }
rules:
  - { name: dns, from: [any], to: [any], services: [udp/53] }
"#,
        "192.0.2.1 > 192.0.2.2 tcp 22 = denied unsegmented
         192.0.2.1 > 192.0.2.2 udp 53 = allowed rule_allow dns
         10.0.1.1 > 192.0.2.2 tcp 22 = denied unsegmented
         192.0.2.2 > 10.0.1.1 tcp 22 = denied default_deny a
         2001:db8::1 > 2001:db8::2 tcp 22 = denied unsegmented",
    ),
    (
        "defaults: unsegmented: deny, in observe and off",
        r#"
defaults: { mode: observe, unsegmented: deny }
segments:
  a: { members: [{cidr: 10.0.1.0/24}] }
  b: { members: [{cidr: 10.0.2.0/24}], mode: "off" }
rules:
  - { name: x, from: [a], to: [b], services: [tcp/1] }
"#,
        "192.0.2.1 > 192.0.2.2 tcp 22 = would_deny unsegmented
         10.0.1.1 > 192.0.2.2 tcp 22 = would_deny default_deny a
         10.0.2.1 > 192.0.2.2 tcp 22 = off default_deny b",
    ),
    (
        "the strength of a deny rule is that of the segments it matched through",
        r#"
segments:
  soft: { members: [{cidr: 10.0.1.0/24}], mode: observe }
  none: { members: [{cidr: 10.0.1.0/28}], mode: "off" }
  hard: { members: [{cidr: 10.0.2.0/24}], mode: enforce }
rules:
  - { name: by-soft, from: [soft], to: [unsegmented], services: [tcp/1], action: deny }
  - { name: by-none, from: [none], to: [unsegmented], services: [tcp/2], action: deny }
  - { name: by-both, from: [soft, none], to: [unsegmented], services: [tcp/3], action: deny }
  - { name: to-hard, from: [soft], to: [hard], services: [tcp/4], action: deny }
  - { name: any-hard, from: [soft], to: [any], services: [tcp/5], action: deny }
"#,
        "10.0.1.1 > 192.0.2.1 tcp 1 = would_deny rule_deny by-soft
         10.0.1.1 > 192.0.2.1 tcp 2 = off rule_deny by-none
         10.0.1.1 > 192.0.2.1 tcp 3 = would_deny rule_deny by-both
         10.0.1.1 > 10.0.2.1 tcp 4 = denied rule_deny to-hard
         10.0.1.1 > 10.0.2.1 tcp 5 = would_deny rule_deny any-hard",
    ),
    (
        "of several denies the strongest, then file order",
        r#"
segments:
  soft: { members: [{cidr: 10.0.1.0/24}], mode: observe }
  hard: { members: [{cidr: 10.0.2.0/24}], mode: enforce }
rules:
  - { name: first, from: [soft], to: [any], services: [any], action: deny }
  - { name: second, from: [any], to: [hard], services: [any], action: deny }
  - { name: third, from: [any], to: [hard], services: [tcp/1], action: deny }
"#,
        "10.0.1.1 > 10.0.2.1 tcp 1 = denied rule_deny second
         10.0.1.1 > 192.0.2.1 tcp 1 = would_deny rule_deny first
         192.0.2.1 > 10.0.2.1 tcp 1 = denied rule_deny second",
    ),
    (
        "any to any: strength of the defaults",
        r#"
defaults: { mode: observe }
segments:
  hard: { members: [{cidr: 10.0.2.0/24}], mode: enforce }
rules:
  - { name: telnet, from: [any], to: [any], services: [tcp/23], action: deny }
"#,
        "192.0.2.1 > 192.0.2.2 tcp 23 = would_deny rule_deny telnet
         10.0.2.1 > 192.0.2.2 tcp 23 = would_deny rule_deny telnet
         10.0.2.1 > 192.0.2.2 tcp 24 = denied default_deny hard",
    ),
    (
        "any in an allow leaves tunnels out; in a deny it does not",
        r#"
segments:
  a: { members: [{cidr: 10.0.1.0/24}, {cidr: "fd00:1::/64"}] }
  b: { members: [{cidr: 10.0.2.0/24}] }
rules:
  - { name: most, from: [a], to: [unsegmented], services: [any] }
  - { name: gre, from: [a], to: [unsegmented], services: [proto/gre] }
  - { name: none, from: [b], to: [any], services: [any], action: deny }
"#,
        "10.0.1.1 > 192.0.2.1 tcp 65535 = allowed rule_allow most
         10.0.1.1 > 192.0.2.1 sctp 0 = allowed rule_allow most
         10.0.1.1 > 192.0.2.1 proto 255 = allowed rule_allow most
         10.0.1.1 > 192.0.2.2 proto 47 = allowed rule_allow gre
         10.0.1.1 > 192.0.2.1 proto 4 = denied default_deny a
         10.0.1.1 > 192.0.2.1 proto 41 = denied default_deny a
         10.0.1.1 > 192.0.2.1 proto 50 = denied default_deny a
         10.0.1.1 > 192.0.2.1 proto 51 = denied default_deny a
         10.0.1.1 > 192.0.2.1 proto 137 = denied default_deny a
         fd00:1::1 > 2001:db8::1 proto 97 = denied default_deny a
         fd00:1::1 > 2001:db8::1 proto 115 = denied default_deny a
         fd00:1::1 > 2001:db8::1 proto 47 = allowed rule_allow gre
         10.0.2.1 > 192.0.2.1 proto 4 = denied rule_deny none
         10.0.2.1 > 192.0.2.1 proto 47 = denied rule_deny none",
    ),
    (
        "protocols do not alias",
        r#"
segments:
  a: { members: [{cidr: 10.0.1.0/24}, {cidr: "fd00:1::/64"}] }
rules:
  - { name: t, from: [a], to: [any], services: [tcp/53] }
  - { name: u, from: [a], to: [any], services: [udp/54] }
  - { name: s, from: [a], to: [any], services: [sctp/55] }
"#,
        "10.0.1.1 > 192.0.2.1 tcp 53 = allowed rule_allow t
         10.0.1.1 > 192.0.2.1 udp 53 = denied default_deny a
         10.0.1.1 > 192.0.2.1 sctp 53 = denied default_deny a
         10.0.1.1 > 192.0.2.1 udp 54 = allowed rule_allow u
         10.0.1.1 > 192.0.2.1 tcp 54 = denied default_deny a
         10.0.1.1 > 192.0.2.1 sctp 55 = allowed rule_allow s
         10.0.1.1 > 192.0.2.1 proto 136 = denied default_deny a
         fd00:1::1 > 2001:db8::1 tcp 53 = allowed rule_allow t
         fd00:1::1 > 2001:db8::1 udp 54 = allowed rule_allow u
         fd00:1::1 > 2001:db8::1 proto 33 = denied default_deny a",
    ),
    (
        "ICMP is of IPv4, ICMPv6 of IPv6",
        r#"
segments:
  a: { members: [{cidr: 10.0.1.0/24}, {cidr: "fd00:1::/64"}] }
rules:
  - { name: four, from: [a], to: [any], services: [icmp/8] }
  - { name: six, from: [a], to: [any], services: [icmpv6/128, icmpv6/200] }
"#,
        "10.0.1.1 > 192.0.2.1 icmp 8 = allowed rule_allow four
         10.0.1.1 > 192.0.2.1 icmp 13 = denied default_deny a
         10.0.1.1 > 192.0.2.1 icmp 5 = denied default_deny a
         10.0.1.1 > 192.0.2.1 icmp 128 = denied default_deny a
         10.0.1.1 > 192.0.2.1 icmp 200 = denied default_deny a
         10.0.1.1 > 192.0.2.1 proto 58 = denied default_deny a
         fd00:1::1 > 2001:db8::1 icmp 128 = allowed rule_allow six
         fd00:1::1 > 2001:db8::1 icmp 200 = allowed rule_allow six
         fd00:1::1 > 2001:db8::1 icmp 8 = denied default_deny a
         fd00:1::1 > 2001:db8::1 proto 1 = denied default_deny a",
    ),
    (
        "IPv4 and IPv6 are disjoint",
        r#"
segments:
  six: { members: [{cidr: "::/0"}] }
rules:
  - { name: x, from: [six], to: [six], services: [tcp/443] }
"#,
        "2001:db8::1 > fd00::1 tcp 443 = allowed rule_allow x
         2001:db8::1 > fd00::1 tcp 22 = denied default_deny six
         64:ff9b::a00:101 > 2002:a00:101::1 tcp 22 = denied default_deny six
         10.0.1.1 > 10.0.2.1 tcp 22 = allowed unsegmented",
    ),
    (
        "everything of IPv4",
        r#"
segments:
  four: { members: [{cidr: 0.0.0.0/0, except: [10.0.0.0/8]}] }
rules:
  - { name: in, from: [four], to: [unsegmented], services: [https] }
"#,
        "192.0.2.1 > 10.0.0.1 tcp 443 = allowed rule_allow in
         192.0.2.1 > 10.0.0.1 tcp 22 = denied default_deny four
         9.255.255.255 > 11.0.0.0 tcp 22 = denied default_deny four
         10.255.255.255 > 10.0.0.0 tcp 22 = allowed unsegmented
         2001:db8::1 > 2001:db8::2 tcp 22 = allowed unsegmented",
    ),
    (
        "unsegmented is who is in no segment, whatever its mode",
        r#"
segments:
  a: { members: [{cidr: 10.0.1.0/24}] }
  idle: { members: [{cidr: 10.0.2.0/24}], mode: "off" }
rules:
  - { name: out, from: [a], to: [unsegmented], services: [https] }
"#,
        "10.0.1.1 > 192.0.2.1 tcp 443 = allowed rule_allow out
         10.0.1.1 > 10.0.2.1 tcp 443 = denied default_deny a",
    ),
    (
        "host and multicast",
        r#"
segments:
  admin: { members: [{cidr: 10.0.1.0/24}] }
rules:
  - { name: ssh, from: [admin], to: [host], services: [ssh] }
  - { name: out, from: [host], to: [admin], services: [any] }
  - { name: mdns, from: [admin], to: [multicast], services: [udp/5353] }
"#,
        "10.0.1.1 > 10.0.9.9 tcp 22 = allowed rule_allow ssh
         10.0.1.1 > 10.0.9.8 tcp 22 = denied default_deny admin
         10.0.9.9 > 10.0.1.1 tcp 8080 = allowed rule_allow out
         10.0.9.8 > 10.0.1.1 tcp 8080 = denied default_deny admin
         10.0.1.1 > 224.0.0.251 udp 5353 = allowed rule_allow mdns
         10.0.1.1 > 255.255.255.255 udp 5353 = allowed rule_allow mdns
         10.0.1.1 > 224.0.0.251 udp 53 = denied default_deny admin
         10.0.1.1 > 10.0.1.255 udp 5353 = denied default_deny admin",
    ),
    (
        "groups stand for their segments",
        r#"
segments:
  a: { members: [{cidr: 10.0.1.0/24}] }
  b: { members: [{cidr: 10.0.2.0/24}] }
  c: { members: [{cidr: 10.0.3.0/24}] }
groups:
  ab: [a, b]
  all: [ab, c]
rules:
  - { name: up, from: [ab], to: [c], services: [tcp/1] }
  - { name: mesh, from: [all], to: [all], services: [tcp/2] }
"#,
        "10.0.1.1 > 10.0.3.1 tcp 1 = allowed rule_allow up
         10.0.2.1 > 10.0.3.1 tcp 1 = allowed rule_allow up
         10.0.3.1 > 10.0.3.2 tcp 1 = denied default_deny c
         10.0.3.1 > 10.0.1.1 tcp 2 = allowed rule_allow mesh
         10.0.3.1 > 10.0.3.2 tcp 2 = allowed rule_allow mesh
         10.0.3.1 > 192.0.2.1 tcp 2 = denied default_deny c",
    ),
    (
        "single hosts among networks, IPv4 and IPv6",
        r#"
segments:
  net: { members: [{cidr: 10.0.0.0/16}, {cidr: "fd00::/16"}], mode: observe }
  pair: { members: [{cidr: 10.0.1.7/32}, {cidr: 10.0.1.9/32}, {cidr: "fd00::7/128"}, {cidr: "fd00::9/128"}] }
rules:
  - { name: x, from: [pair], to: [pair], services: [tcp/1] }
"#,
        "10.0.1.7 > 10.0.1.9 tcp 1 = allowed rule_allow x
         10.0.1.7 > 10.0.1.8 tcp 1 = denied default_deny pair
         10.0.1.8 > 10.0.1.9 tcp 1 = denied default_deny pair
         10.0.1.6 > 10.0.1.8 tcp 1 = would_deny default_deny net
         fd00::7 > fd00::9 tcp 1 = allowed rule_allow x
         fd00::7 > fd00::8 tcp 1 = denied default_deny pair
         fd00::6 > fd00::8 tcp 1 = would_deny default_deny net
         fd00:0:0:1::7 > fd00::8 tcp 1 = would_deny default_deny net",
    ),
    (
        "IPv6 prefixes at odd lengths",
        r#"
segments:
  half: { members: [{cidr: "fd00:1:2:3:8000::/65"}] }
  odd: { members: [{cidr: "fd00:1:2:3::/127"}] }
rules:
  - { name: x, from: [half], to: [odd], services: [tcp/1] }
"#,
        "fd00:1:2:3:8000::1 > fd00:1:2:3::1 tcp 1 = allowed rule_allow x
         fd00:1:2:3:ffff:ffff:ffff:ffff > fd00:1:2:3:: tcp 1 = allowed rule_allow x
         fd00:1:2:3:8000::1 > fd00:1:2:3::2 tcp 1 = denied default_deny half
         fd00:1:2:3:7fff:ffff:ffff:ffff > fd00:1:2:3::1 tcp 1 = denied default_deny odd
         fd00:1:2:4:: > fd00:1:2:3::2 tcp 1 = allowed unsegmented",
    ),
    (
        "port ranges at their ends",
        r#"
segments:
  a: { members: [{cidr: 10.0.1.0/24}] }
rules:
  - { name: low, from: [a], to: [any], services: [tcp/0, tcp/255-257] }
  - { name: high, from: [a], to: [any], services: [tcp/65535, udp/any] }
  - { name: hole, from: [a], to: [any], services: [udp/1000-2000], action: deny }
"#,
        "10.0.1.1 > 192.0.2.1 tcp 0 = allowed rule_allow low
         10.0.1.1 > 192.0.2.1 tcp 1 = denied default_deny a
         10.0.1.1 > 192.0.2.1 tcp 254 = denied default_deny a
         10.0.1.1 > 192.0.2.1 tcp 255 = allowed rule_allow low
         10.0.1.1 > 192.0.2.1 tcp 256 = allowed rule_allow low
         10.0.1.1 > 192.0.2.1 tcp 257 = allowed rule_allow low
         10.0.1.1 > 192.0.2.1 tcp 258 = denied default_deny a
         10.0.1.1 > 192.0.2.1 tcp 65534 = denied default_deny a
         10.0.1.1 > 192.0.2.1 tcp 65535 = allowed rule_allow high
         10.0.1.1 > 192.0.2.1 udp 0 = allowed rule_allow high
         10.0.1.1 > 192.0.2.1 udp 999 = allowed rule_allow high
         10.0.1.1 > 192.0.2.1 udp 1000 = denied rule_deny hole
         10.0.1.1 > 192.0.2.1 udp 2000 = denied rule_deny hole
         10.0.1.1 > 192.0.2.1 udp 2001 = allowed rule_allow high",
    ),
];
