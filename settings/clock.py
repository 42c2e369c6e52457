"""几点钟：用户写的 23:00，是哪一天的 23:00。"""

import re
from datetime import datetime, timedelta

SHOWN = "%Y-%m-%d %H:%M"


def moment(text: str, now: datetime) -> datetime | None:
    """「23:00」是接下来的那个 23:00；也可以连日期一起写「2026-11-30 07:30」。都不是，None。"""
    text = text.strip().replace("：", ":").replace("T", " ")
    if match := re.fullmatch(r"(\d{1,2}):(\d\d)", text):
        hour, minute = map(int, match.groups())
        if hour > 23 or minute > 59:
            return None
        today = now.replace(hour=hour, minute=minute, second=0, microsecond=0)
        return today if today > now else today + timedelta(days=1)
    try:
        found = datetime.strptime(text, SHOWN)
    except ValueError:
        return None
    return found if 1970 < found.year < 9999 else None  # 之外的，有的系统写不出、算不了
